"""Far: adds whose skip lies far back, such as one value that all blocks add; what is between is collected when asked.

A block's nodes are all nodes from its skip to its add.  Where n adds have one far skip, these are n^2 nodes, nearly
all of them for blocks that will stay as they are, since shorter blocks inside of them form a longer chain.  So

1. the *span* of an add are the positions from its skip to it.  Adds of large spans are collected
   (:mod:`mfx.find.block`) until these come to a number for each node of the graph; those after are left as a
   :class:`Far`;
2. a far add that goes on after itself (operations that could belong to it, a block that starts from it) is collected in
   any case, so a far add is the end of its chain;
3. which of them are needed the plan decides (:mod:`mfx.plan.level`), by a *witness*: a node between skip and add that
   is part of a longer chain, looked for from the add backwards.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

from torch import fx

from mfx.errors import Reason
from mfx.find.block import Block, Rejection, collect
from mfx.find.check import check
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow, rearranged
from mfx.graph.notes import SHAPE

NEAR = 256
"""The largest span that is always collected."""
A_NODE = 32
"""To how many positions for each node of the graph larger spans are collected."""
_LOOKED_AT = 64
"""The most nodes among which a witness is looked for."""


@dataclass(frozen=True, eq=False)
class Far:
    """A residual add with a far skip; ``shared`` says whether skip and branch come from one input of the graph."""

    add: fx.Node
    skip: fx.Node
    value: fx.Node
    scale: float
    written: str
    passed: tuple[fx.Node, ...]
    branch_first: bool
    shared: bool
    name: str = ""

    @property
    def output(self) -> fx.Node:
        """The add."""
        return self.add

    def collected(self, flow: Dataflow) -> Block | Rejection | None:
        """The block, why there is none, or None where the add is not residual."""
        block = collect(flow, "residual", self.skip, self.value, self.add, scale=self.scale, written=self.written)
        found = check(flow, replace(block, passed=self.passed, branch_first=self.branch_first))
        if not self.shared and isinstance(found, Rejection) and found.reason is Reason.NO_PARAMETERS:
            return None
        return replace(found, name=self.name)

    def witness(self, flow: Dataflow, taken: Container[fx.Node]) -> fx.Node | None:
        """A node of the block that is ``taken``; None where none is found near the add."""
        pending, seen = [self.value], set[fx.Node]()
        while pending and len(seen) < _LOOKED_AT:
            node = pending.pop(0)
            if node in seen or node is self.skip or self.skip not in flow.ancestors[node]:
                continue
            if node in taken and not operations.is_query(node):
                return node
            seen.add(node)
            pending += [] if operations.is_query(node) else node.all_input_nodes
        return None


class Spans:
    """Tells which adds of a graph are far; adds up what has been collected."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.left = A_NODE * len(flow.nodes)

    def is_far(self, far: Far) -> bool:
        """Whether ``far`` is to stay what it is."""
        span = self.flow.position[far.add] - self.flow.position[far.skip]
        if span <= NEAR:
            return False
        if span <= self.left:
            self.left -= span
            return False
        shapes = far.skip.meta.get(SHAPE), far.value.meta.get(SHAPE)
        return not (None not in shapes and shapes[0] != shapes[1]) and not self._goes_on(far.add)

    def _goes_on(self, add: fx.Node) -> bool:
        """Whether operations follow that could belong to the block."""
        users = [user for user in add.users if not operations.is_query(user)]
        return bool(rearranged(add)) or (len(users) == 1 and users[0] not in self.flow.adds)
