"""Plan: from what was found and what was asked to what will be rewritten.  Pure; a frozen value.

1. Blocks the caller excludes, or gives no gamma, are kept.
2. Of blocks that overlap (nested, or long skips around others) the level with the longer chain is kept,
   the outer one on a tie.
3. Consecutive blocks, each skip being the block before's output, form a *chain*.  The chain will run as one
   node where its last block ends, so a block joins only if nothing in between stands in the way: no side
   value computed from the chain itself, and no change in the order in which the random generator, written
   memory or shared stateful modules are used.  Otherwise a new chain starts there.
4. Each chain gets its gammas and, by :mod:`mfx.precision`, its snapshots.

Reference: the recurrence is Sander et al., ICML 2021, arXiv 2102.07870, equation (5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import fx

from mfx import operations
from mfx.block import Block, Rejection
from mfx.dataflow import AMBIENT, DTYPE, Dataflow
from mfx.errors import Reason
from mfx.find import Found
from mfx.options import Options, check_patterns
from mfx.precision import Schedule, schedule


@dataclass(frozen=True, eq=False)
class Chain:
    """Consecutive blocks that share one velocity.

    ``taps`` are states before the last that are read outside the chain, ``escapes`` branch values read
    outside it, both in order.
    """

    index: int
    blocks: tuple[Block, ...] = field(repr=False)
    gammas: tuple[float, ...]
    state_dtype: torch.dtype | str
    tolerance: float | None
    taps: tuple[fx.Node, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks' names, in order."""
        return tuple(block.name for block in self.blocks)

    @property
    def input(self) -> fx.Node:
        """x_0."""
        return self.blocks[0].skip

    @property
    def output(self) -> fx.Node:
        """x_N."""
        return self.blocks[-1].output

    @property
    def escapes(self) -> tuple[fx.Node, ...]:
        """The branch values that are handed out."""
        return tuple(node for block in self.blocks for node in block.escapes)

    @property
    def note(self) -> str:
        """Gammas and schedule in a line; where the dtype of x is not known, for float32."""
        dtype = self.input.meta.get(DTYPE, torch.float32)
        found = self.schedule(dtype if dtype.is_floating_point else torch.float32)
        gammas = ", ".join(f"{gamma:g}" for gamma in dict.fromkeys(self.gammas))
        return f"gamma {gammas}; {len(self.blocks)} steps; {found.note(len(self.blocks))}"

    def with_gammas(self, options: Options) -> Chain:
        """The chain with the gammas that ``options`` give its blocks."""
        return replace(self, gammas=_gammas(self.blocks, options))

    def schedule(self, dtype: torch.dtype, compute: torch.dtype | None = None, same_branches: bool = True) -> Schedule:
        """State dtype and snapshots for an input of ``dtype``; see :func:`mfx.precision.schedule`."""
        return schedule(self.gammas, dtype, self.state_dtype, self.tolerance, compute, same_branches)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is rewritten and what is kept, and why."""

    chains: tuple[Chain, ...]
    rejections: tuple[Rejection, ...]
    options: Options

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The names of each chain's blocks."""
        return tuple(chain.names for chain in self.chains)

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """For each residual add by name: the names of its chain, none where it is kept."""
        kept: dict[str, tuple[str, ...]] = {row.name: () for row in self.rejections}
        return kept | {name: chain for chain in self.names for name in chain}


def plan(found: Found, options: Options) -> Plan:
    """The plan for ``found`` under ``options``."""
    names = [row.name for row in (*found.blocks, *found.rejections)]
    for argument in ("include", "exclude"):
        check_patterns(argument, getattr(options, argument), names)
    if isinstance(options.gamma, tuple) and names:
        check_patterns("gamma", (pattern for pattern, _ in options.gamma), names)
    rejections = list(found.rejections)
    asked = _asked(found.blocks, options, rejections)
    kept = _one_level(asked, rejections)
    runs = _settled(found.flow, kept, rejections)
    chains = [_chain(index, run, options, found.flow) for index, run in enumerate(runs)]
    rejections.sort(key=lambda rejection: found.flow.position[rejection.add])
    return Plan(tuple(chains), tuple(rejections), options)


def _reject(block: Block, reason: Reason, node: object = None) -> Rejection:
    return Rejection(block.output, reason, node, block.name)


def _asked(blocks: Iterable[Block], options: Options, rejections: list[Rejection]) -> list[Block]:
    """The blocks that the caller wants rewritten."""
    asked = []
    for block in blocks:
        if not options.selects(block.name):
            rejections.append(_reject(block, Reason.EXCLUDED))
        elif options.gamma_of(block.name) is None:
            rejections.append(_reject(block, Reason.NO_GAMMA))
        else:
            asked.append(block)
    return asked


def _one_level(blocks: list[Block], rejections: list[Rejection]) -> list[Block]:
    """Of overlapping blocks, those in the longer chain; the outer ones on a tie."""
    lengths = _chain_lengths(blocks)
    order = {block: index for index, block in enumerate(blocks)}
    ranked = sorted(blocks, key=lambda block: (-lengths[block], -len(block.nodes), order[block]))
    owner: dict[fx.Node, Block] = {}
    kept = []
    for block in ranked:
        other = next((owner[node] for node in block.nodes if node in owner), None)
        if other is not None:
            rejections.append(_reject(block, Reason.NESTED, other.name))
            continue
        kept.append(block)
        owner.update(dict.fromkeys(block.nodes, block))
    return sorted(kept, key=order.__getitem__)


def _chain_lengths(blocks: list[Block]) -> dict[Block, int]:
    """For each block, the length of the longest run of linked blocks through it."""
    forward: dict[Block, int] = {}
    starts: dict[fx.Node, list[Block]] = {}
    ends: dict[fx.Node, int] = {}
    for block in blocks:
        starts.setdefault(block.skip, []).append(block)
    for block in reversed(blocks):
        forward[block] = 1 + max((forward[after] for after in starts.get(block.output, ())), default=0)
    lengths = {}
    for block in blocks:
        backward = 1 + ends.get(block.skip, 0)
        ends[block.output] = max(ends.get(block.output, 0), backward)
        lengths[block] = forward[block] + backward - 1
    return lengths


def _settled(flow: Dataflow, blocks: list[Block], rejections: list[Rejection]) -> list[list[Block]]:
    """The runs, where a block that is kept after all writes in place again, and may stand in others' way."""
    while True:
        lost: list[Rejection] = []
        runs = _without_cycles(flow, _runs(flow, blocks, lost), lost)
        rejections += lost
        adds = {rejection.add for rejection in lost}
        if not any(block.written for block in blocks if block.output in adds):
            return runs
        blocks = [block for block in blocks if block.output not in adds]


def _runs(flow: Dataflow, blocks: list[Block], rejections: list[Rejection]) -> list[list[Block]]:
    """Chains of blocks, each as long as nothing in between stands in the way."""
    open_runs: dict[fx.Node, _Run] = {}
    finished: list[_Run] = []
    written = [block for block in blocks if block.written]
    ignored: set[tuple[object, fx.Node]] = {
        (flow.memory[block.add], node) for block in written for node in block.tail or (block.add,)
    }
    for block in blocks:
        run = open_runs.pop(block.skip, None)
        if run is None or run.obstacle(block) is not None:
            run = _Run(flow, block.skip, ignored)
            obstacle = run.obstacle(block)
            if obstacle is not None:
                rejections.append(_reject(block, Reason.ORDER, obstacle))
                continue
            finished.append(run)
        run.blocks.append(block)
        run.states.add(block.output)
        open_runs[block.output] = run
    return [run.blocks for run in finished]


class _Run:
    """A chain in the making; scans its span of the graph once.

    Execution will have three phases: what does not depend on the chain (0), the chain (1), what depends on it
    (2).  Each resource must be used in non-decreasing phases, or the rewriting would change an order.  Writes into
    memory are ``ignored`` (memory, writer) where the rewritten add, and what follows it, have a tensor of their own.
    """

    def __init__(self, flow: Dataflow, start: fx.Node, ignored: set[tuple[object, fx.Node]]) -> None:
        self.flow = flow
        self.blocks: list[Block] = []
        self.scanned = flow.position[start] + 1
        self.states = {start}
        self.members: set[fx.Node] = set()
        self.late: set[fx.Node] = set()
        self.phases: dict[object, int] = {}
        self.inside: bool | None = None
        self.ignored = ignored

    def obstacle(self, block: Block) -> fx.Node | None:
        """Take ``block`` in if possible; else the node that stands in the way (the run is then over)."""
        end = self.flow.position[block.output] + 1
        self.members |= set(block.nodes)
        for node in self.flow.nodes[self.scanned : end]:
            phase = self._phase(node)
            if phase == 2:
                self.late.add(node)
            if phase == 1 and self._switches(node):
                return node
            for resource in self._resources(node):
                if phase < self.phases.get(resource, 0):
                    return node
                self.phases[resource] = phase
        self.scanned = end
        return next((side for side in block.sides if side in self.late), None)

    def _switches(self, node: fx.Node) -> bool:
        """Whether a member runs under another mode than the members before it."""
        if node.op == "get_attr" or operations.is_query(node):
            return False
        inside = AMBIENT in self.flow.resources.get(node, ())
        switches = self.inside is not None and self.inside != inside
        self.inside = inside
        return switches

    def _phase(self, node: fx.Node) -> int:
        if node in self.members:
            return 1
        return 2 if any(self._is_late(source, node) for source in node.all_input_nodes) else 0

    def _is_late(self, source: fx.Node, reader: fx.Node) -> bool:
        if source in self.late:
            return True
        of_shape = operations.is_shape_query(reader) and source in self.states
        return source in self.members and not of_shape

    def _resources(self, node: fx.Node) -> Iterable[object]:
        for resource in self.flow.resources.get(node, ()):
            writers = self.flow.writers.get(resource, ()) if isinstance(resource, fx.Node) else (node,)
            if any((resource, writer) not in self.ignored for writer in writers):
                yield resource


def _without_cycles(flow: Dataflow, runs: list[list[Block]], rejections: list[Rejection]) -> list[list[Block]]:
    """Split chains that would have to run both before and after each other."""
    while True:
        contracted = contract(flow, runs)
        knots = [knot for knot in nx.strongly_connected_components(contracted) if len(knot) > 1]
        if not knots:
            return runs
        tied = {index for knot in knots for index in knot if isinstance(index, int)}
        longest = max(tied, key=lambda index: len(runs[index]))
        if len(runs[longest]) > 1:
            singles = [[block] for block in runs[longest]]
            runs = [*runs[:longest], *singles, *runs[longest + 1 :]]
        else:
            rejections.append(_reject(runs[longest][0], Reason.ORDER, runs[longest][0].output))
            runs = [*runs[:longest], *runs[longest + 1 :]]


def contract(flow: Dataflow, chains: Sequence[Sequence[Block]]) -> nx.DiGraph:
    """What must run before what, each chain being one node: its number.

    What all states of a chain have in common (shape, device) is asked of x_0.
    """
    owner = {node: index for index, chain in enumerate(chains) for block in chain for node in block.nodes}
    inputs = first_states(chains)
    contracted = nx.DiGraph()
    for node in flow.nodes:
        here = owner.get(node, node)
        contracted.add_node(here)
        for source in node.all_input_nodes:
            asked = inputs.get(source, source) if operations.is_shape_query(node) else source
            before = owner.get(asked, asked)
            if before != here:
                contracted.add_edge(before, here)
    return contracted


def first_states(chains: Sequence[Sequence[Block]]) -> dict[fx.Node, fx.Node]:
    """For the inner states of each chain, its x_0."""
    return {block.output: chain[0].skip for chain in chains for block in chain[:-1]}


def _gammas(blocks: Iterable[Block], options: Options) -> tuple[float, ...]:
    gammas = [options.gamma_of(block.name) for block in blocks]
    chosen = tuple(gamma for gamma in gammas if gamma is not None)
    return (0.0, *chosen[1:]) if options.velocity == "first" else chosen


def _chain(index: int, blocks: list[Block], options: Options, flow: Dataflow) -> Chain:
    inside = {node for block in blocks for node in block.nodes}
    states = [block.output for block in blocks[:-1]]
    return Chain(
        index=index,
        blocks=tuple(blocks),
        gammas=_gammas(blocks, options),
        state_dtype=options.state_dtype,
        tolerance=options.tolerance,
        taps=tuple(state for state in states if any(_taps(user, inside) for user in state.users)),
    )


def _taps(user: fx.Node, inside: set[fx.Node]) -> bool:
    return user not in inside and not operations.is_shape_query(user)
