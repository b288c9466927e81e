"""Plan: from what was found and what was asked to what will be rewritten.  Pure; a frozen value.

1. Blocks the caller excludes, or gives no gamma, are kept.
2. Of blocks that overlap (nested, or long skips around others) the level with the longer chain is kept,
   the outer one on a tie (:mod:`mfx.plan.level`).
3. Consecutive blocks, each skip being the block before's output, form a *chain* (:mod:`mfx.plan.order`).
4. Each block gets its rule; each chain its schedule (:mod:`mfx.rule.arithmetic.snapshots`), and the way it runs, in
   eager mode and under a compiler.

Reference: the recurrence is Sander et al., ICML 2021, arXiv 2102.07870, equation (5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from torch import fx

from mfx.errors import Reason
from mfx.find import Block, Far, Found, Rejection
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.options import Options, check_patterns
from mfx.plan.chain import Chain, Plan, Way
from mfx.plan.level import one_level, reject
from mfx.plan.order import runs_of
from mfx.rule import Rule

_Row = TypeVar("_Row", Block, Far)


def plan(
    found: Found,
    options: Options,
    numbers: Mapping[str, int] = MappingProxyType({}),
    first: int = 0,
    before: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Plan:
    """The plan for ``found`` under ``options``.

    ``numbers`` are those of chains in the whole model, by first block; chains that have none count on from ``first``.
    ``before`` are the places of an earlier plan, for another mode, say: where this one would make longer chains, it
    makes those.
    """
    if not options.checked:
        _check_patterns(found, options)
    rejections = list(found.rejections)
    asked, far = _asked(found.blocks, options, rejections), _asked(found.far, options, rejections)
    kept = one_level(found.flow, asked, far, rejections)
    runs = _as_before(runs_of(found.flow, kept, rejections), before, rejections)
    chains = [_chain(index, run, options, found.flow) for index, run in enumerate(runs)]
    chains = [replace(chain, number=numbers.get(chain.names[0], first + chain.index)) for chain in chains]
    rejections.sort(key=lambda rejection: found.flow.position[rejection.add])
    return Plan(tuple(chains), tuple(rejections), options)


def _check_patterns(found: Found, options: Options) -> None:
    """Refuse patterns that match no block."""
    names = [row.name for row in found.rows]
    for argument in ("include", "exclude"):
        check_patterns(argument, getattr(options, argument), names)
    if isinstance(options.gamma, tuple) and names:
        check_patterns("gamma", (pattern for pattern, _ in options.gamma), names)


def _asked(blocks: Iterable[_Row], options: Options, rejections: list[Rejection]) -> list[_Row]:
    """The blocks that the caller wants rewritten."""
    asked: list[_Row] = []
    for block in blocks:
        if not options.selects(block.name):
            rejections.append(reject(block, Reason.EXCLUDED))
        elif options.rule_of(block.name) is None:
            rejections.append(reject(block, Reason.NO_GAMMA))
        else:
            asked.append(block)
    return asked


def _as_before(
    runs: Iterable[list[Block]], before: Mapping[str, tuple[str, ...]], rejections: list[Rejection]
) -> list[list[Block]]:
    """The runs, parted where an earlier plan begins another chain, without the blocks that it keeps.

    A block that it has not stays where it is: the model is another one, and not in another mode alone.
    """
    parts: list[list[Block]] = []
    for run in runs:
        last = None
        for block in run:
            chain = before.get(block.name, last)
            if chain == ():
                rejections.append(reject(block, Reason.KEPT_BEFORE))
            elif block is run[0] or chain != last:
                parts.append([block])
            else:
                parts[-1].append(block)
            last = chain
    return parts


def with_options(plan: Plan, options: Options) -> Plan:
    """The plan with the rules that ``options`` give its blocks; chains stay as they are."""
    chains = tuple(replace(chain, rules=_rules(chain.blocks, options)) for chain in plan.chains)
    return replace(plan, chains=chains, options=options)


def _rules(blocks: Iterable[Block], options: Options) -> tuple[Rule, ...]:
    """The rule of each block; the first one acts like the plain block where that is asked for."""
    rules = tuple(rule for block in blocks if (rule := options.rule_of(block.name)) is not None)
    return (rules[0].starting, *rules[1:]) if options.velocity == "first" else rules


def _chain(index: int, blocks: list[Block], options: Options, flow: Dataflow) -> Chain:
    inside = {node for block in blocks for node in block.nodes}
    states = [block.output for block in blocks[:-1]]
    return Chain(
        index=index,
        blocks=tuple(blocks),
        rules=_rules(blocks, options),
        state_dtype=options.state_dtype,
        tolerance=options.tolerance,
        way=Way() if options.reversible else Way(Reason.STORED_ON_REQUEST),
        number=index,
        readout=options.readout,
        taps=tuple(state for state in states if any(_taps(user, inside) for user in state.users)),
    )


def _taps(user: fx.Node, inside: set[fx.Node]) -> bool:
    return user not in inside and not operations.is_shape_query(user)
