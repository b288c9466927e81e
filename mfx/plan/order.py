"""Order: consecutive blocks as chains, each as long as nothing in between stands in the way.

A chain will run as one node where its last block ends.  So a block joins only if its add runs under the same grad mode
and autocast, no side value of it is computed from
the chain itself, and nothing changes in the order in which the random generator, written memory or shared stateful
modules are used (:mod:`mfx.graph.resources`); otherwise a new chain starts there.  What is drawn between two blocks
becomes a part of the second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx
from torch import fx

from mfx.errors import Reason
from mfx.find import Block, Rejection
from mfx.find.block import with_members
from mfx.find.check import check
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import MODES, Modes
from mfx.graph.resources import AMBIENT, GENERATOR
from mfx.plan.level import reject


def runs_of(flow: Dataflow, blocks: list[Block], rejections: list[Rejection]) -> list[list[Block]]:
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
    owned = {node for block in blocks for node in block.nodes}
    for block in blocks:
        run = open_runs.pop(block.skip, None)
        block = block if run is None else run.with_draws(block)
        if run is None or run.modes != block.output.meta.get(MODES) or run.obstacle(block) is not None:
            run = _Run(flow, block.skip, ignored, block.output.meta.get(MODES), owned)
            obstacle = run.obstacle(block)
            if obstacle is not None:
                rejections.append(reject(block, Reason.ORDER, obstacle))
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

    def __init__(
        self,
        flow: Dataflow,
        start: fx.Node,
        ignored: set[tuple[object, fx.Node]],
        modes: Modes | None,
        owned: set[fx.Node],
    ) -> None:
        self.flow = flow
        self.modes = modes
        self.blocks: list[Block] = []
        self.scanned = flow.position[start] + 1
        self.states = {start}
        self.members: set[fx.Node] = set()
        self.late: set[fx.Node] = set()
        self.phases: dict[object, int] = {}
        self.inside: bool | None = None
        self.ignored = ignored
        self.owned = owned

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

    def with_draws(self, block: Block) -> Block:
        """``block`` with the draws for it that stand between the chain so far and its add, and what is made of them.

        They have their place in the order of all draws, and would end the chain.
        """
        span = self.flow.nodes[self.scanned : self.flow.position[block.output]]
        taken, known = {*block.members, *self.owned}, self.members | self.late | self.states
        free = [node for node in span if node not in taken and known.isdisjoint(node.all_input_nodes)]
        drawn = {node for node in free if self.flow.may_draw(node) and GENERATOR in self.flow.resources.get(node, ())}
        for node in free:
            if not drawn.isdisjoint(node.all_input_nodes):
                drawn.add(node)
        if not any(not drawn.isdisjoint(member.all_input_nodes) for member in block.members):
            return block
        grown = check(self.flow, with_members(self.flow, block, drawn), named=True)
        return grown if isinstance(grown, Block) else block

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
            rejections.append(reject(runs[longest][0], Reason.ORDER, runs[longest][0].output))
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


def in_order(flow: Dataflow, chains: Sequence[Sequence[Block]]) -> list[fx.Node | int]:
    """Nodes, and chains by their numbers, in an order that respects all inputs, and the original where it can."""

    def place(item: fx.Node | int) -> int:
        return flow.position[chains[item][-1].output if isinstance(item, int) else item]

    return list(nx.lexicographical_topological_sort(contract(flow, chains), place))


def with_segments(order: Sequence[fx.Node | int], segments: Sequence[Block]) -> list[fx.Node | int | Block]:
    """An order in which each segment stands where its first node stood."""
    owner = {node: segment for segment in segments for node in segment.members if node.op != "get_attr"}
    return list(dict.fromkeys(owner.get(item, item) if isinstance(item, fx.Node) else item for item in order))
