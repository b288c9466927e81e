"""Choose: which blocks and segments keep their activations, so that a step stays within a budget.

1. With nothing kept, chains are reversed and all else, chains at gamma = 0 too, is recomputed by segments
   (:mod:`mfx.plan.segments`): the least.  On an accelerator it is less if inputs of segments wait on the host: where
   the budget asks for that, as few as that takes do, the first ones.
2. Blocks and segments are put in the order in which keeping them saves most time: the last one first, which is alive at
   the start of backward in any case, then either those of most work a byte, or from the end on, since blocks that
   are kept up to the end of their chain need nothing of what it takes to undo a state.
3. The peak of a step with the first k of them kept is that of the rewritten graph itself, run on fake tensors
   (:mod:`mfx.budget.step`).  The largest k within the budget is found by bisection.  For the least (0.0) the last
   block of a chain is kept if that does not raise the peak.

Known limits: of what kernels need for themselves while they run, the peak counts that of convolutions on the CPU alone
(:mod:`mfx.budget.workspaces`); inputs, parameters and their gradients it does not.  It is that of the inputs that the
plan was made for.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Any

from torch import nn

from mfx.budget.prices import FLOPS_A_BYTE, prices_of
from mfx.budget.step import Peak, is_on_accelerator, peak_of
from mfx.errors import Reason, TooLittleError
from mfx.find import Block, Found
from mfx.memory import format_bytes
from mfx.plan import Chain, Forecast, Plan, Way
from mfx.plan.order import in_order
from mfx.plan.segments import Prices, segments_of
from mfx.rewrite import Binding, rewrite

_PASSES = 75
"""How often a state's bytes, in the dtype of x, are moved when it is carried a step forward and undone again."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a choice is about."""

    found: Found
    binding: Binding
    root: nn.Module
    inputs: Sequence[Any]


def within(
    found: Found, plan: Plan, binding: Binding, root: nn.Module, inputs: Sequence[Any], budget: int | float
) -> Plan:
    """``plan`` with segments, and with as much kept as ``budget`` (bytes, or a fraction of the plain peak) allows.

    Raises:
        TooLittleError: the budget is below what is possible.
    """
    asked = _Asked(found, binding, root, inputs)
    prices = prices_of(found.flow.graph, root, inputs)
    learned = plan.options.learned
    plan = replace(plan, chains=tuple(replace(chain, plain=chain.at_0 and not learned) for chain in plan.chains))
    order = in_order(found.flow, [chain.blocks for chain in plan.momentum])
    least = replace(plan, segments=segments_of(found.flow, order, prices))
    plain = peak_of(found.flow.graph, root, inputs)
    bottom = _peak(asked, least)
    wanted = budget * plain.bytes if isinstance(budget, float) else budget
    if wanted < bottom.bytes and is_on_accelerator(root, inputs):
        least, bottom = _offloading(asked, least, wanted)
    allowed = _allowed(budget, plain, bottom)
    ranked = _ranked(least, found, prices, allowed - bottom.bytes)
    ranked = _free(asked, least, bottom, ranked) if isinstance(budget, float) and budget == 0.0 else ranked
    peaks = functools.cache(lambda count: _peak(asked, keeping(least, ranked[:count])))
    if isinstance(budget, float) and budget in (0.0, 1.0):
        count = len(ranked)
    else:
        count = bisect_left(range(1, len(ranked) + 1), True, key=lambda count: peaks(count).bytes > allowed)
    peak = peaks(count) if count else bottom
    forecast = Forecast(peak.bytes, peak.after_forward, peak.where, plain.bytes, plain.after_forward, bottom.bytes)
    return replace(keeping(least, ranked[:count]), forecast=forecast)


def without_budget(plan: Plan) -> Plan:
    """``plan`` without what was chosen for a budget."""
    chains = [replace(chain, kept=frozenset(), plain=False) for chain in plan.chains]
    chains = [replace(chain, way=Way()) if chain.way.reason is Reason.WITHIN_BUDGET else chain for chain in chains]
    return replace(plan, chains=tuple(chains), segments=(), offloaded=0, forecast=None)


def _allowed(budget: int | float, plain: Peak, bottom: Peak) -> float:
    if isinstance(budget, float):
        return max(budget * plain.bytes, bottom.bytes)
    if budget < bottom.bytes:
        raise TooLittleError(
            f"activation_budget={format_bytes(budget)} is less than is possible: for these inputs a step needs at "
            f"least {format_bytes(bottom.bytes)} ({bottom.bytes} bytes) for activations, {bottom.where}. Give that, "
            "a smaller batch, or 0.0 for the least"
        )
    return budget


def _offloading(asked: _Asked, least: Plan, budget: float) -> tuple[Plan, Peak]:
    """``least`` and its peak, with inputs of as few segments on the host as bring it down to ``budget``, or lowest."""
    peaks = functools.cache(lambda count: _peak(asked, replace(least, offloaded=count)))
    every = len(least.segments)
    allowed = max(budget, peaks(every).bytes)
    count = bisect_left(range(every), True, key=lambda count: peaks(count).bytes <= allowed)
    return replace(least, offloaded=count), peaks(count)


def _peak(asked: _Asked, plan: Plan) -> Peak:
    return peak_of(rewrite(asked.found, plan, asked.binding).graph, asked.root, asked.inputs, rewritten=True)


def _ranked(plan: Plan, found: Found, prices: Prices, room: float) -> list[Block]:
    """Blocks and segments, in the order in which they are to be kept, as far as there is ``room`` for them."""
    position = found.flow.position
    chains = [chain for chain in plan.momentum if chain.way.reversible]
    items = [*plan.segments, *(block for chain in chains for block in chain.blocks)]
    items = [item for item in items if prices.saved_by(item.members)]
    items.sort(key=lambda item: position[item.output], reverse=True)
    by_work = sorted(items, key=lambda item: prices.work_of(item.members) / prices.saved_by(item.members), reverse=True)
    by_work.sort(key=lambda item: item is not items[0])
    return max((by_work, items), key=lambda order: _spared(order, chains, prices, room))


def _spared(order: Sequence[Block], chains: Sequence[Chain], prices: Prices, room: float) -> float:
    """The work that keeping the first ones in ``order`` spares, within ``room``."""
    bytes_kept = accumulate(prices.saved_by(item.members) for item in order)
    kept = [item for item, total in zip(order, bytes_kept, strict=True) if total <= room]
    ids = {id(item) for item in kept}
    tails = (takewhile(lambda block: id(block) in ids, reversed(chain.blocks)) for chain in chains if not chain.at_0)
    carried = sum(prices.sizes.get(block.output, 0) for tail in tails for block in tail)
    return sum(prices.work_of(item.members) for item in kept) + FLOPS_A_BYTE * _PASSES * carried


def _free(asked: _Asked, least: Plan, bottom: Peak, ranked: Sequence[Block]) -> list[Block]:
    """The last blocks of chains, or of the last chain, if they keep their activations and the peak stays what it is."""
    position = asked.found.flow.position
    ends = {id(chain.blocks[-1]) for chain in least.momentum}
    last = sorted((item for item in ranked if id(item) in ends), key=lambda item: position[item.output])
    for some in (last, last[-1:]):
        if some and _peak(asked, keeping(least, some)).bytes <= bottom.bytes:
            return some
    return []


def keeping(plan: Plan, kept: Sequence[Block]) -> Plan:
    """``plan`` with some blocks and segments keeping their activations; where all of a chain do, it is not reversed."""
    ids = {id(block) for block in kept}
    chains = []
    for chain in plan.chains:
        steps = frozenset(step for step, block in enumerate(chain.blocks) if id(block) in ids)
        if steps and len(steps) == len(chain.blocks):
            chains.append(replace(chain, way=Way(Reason.WITHIN_BUDGET), kept=steps))
        else:
            chains.append(replace(chain, kept=steps))
    segments = tuple(segment for segment in plan.segments if id(segment) not in ids)
    offloaded = sum(id(segment) not in ids for segment in plan.segments[: plan.offloaded])
    return replace(plan, chains=tuple(chains), segments=segments, offloaded=offloaded)
