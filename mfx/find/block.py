"""Block: which nodes a residual block consists of.

The *members* of the block from ``skip`` to ``value`` are

1. all nodes on paths from one to the other (metadata queries cut a path), and the tail after the add;
2. what the members alone use: side values computed on the way, queries of x;
3. queries and assertions on members, items of members that are several values, and in-place writes to the members'
   own values.

What members read from elsewhere are *sides*; members read elsewhere are *escapes*.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx

from mfx.errors import Reason
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import LIFTED, SCOPE


@dataclass(frozen=True, eq=False)
class Block:
    """``x -> y``: residual, ``y = x + scale * f(x)``, or wrapped, ``y = G(x)`` with ``F(x) = G(x) - x``.

    A third kind, branch, is a call ``f(x)`` in whose place ``x + f(x)`` is wanted.

    ``value`` is the node of f(x) or G(x); ``members`` are the nodes that compute it, in order; ``sides``
    are read from outside, ``escapes`` are members (never ``value`` of a wrapped block) read outside.  ``passed``
    are nodes that do nothing, between the skip and the add; ``branch_first`` says in which order it takes its operands;
    ``adds`` how many residual adds it stands for.
    """

    kind: str
    skip: fx.Node
    value: fx.Node
    output: fx.Node
    members: tuple[fx.Node, ...] = field(repr=False)
    sides: tuple[fx.Node, ...] = field(repr=False)
    escapes: tuple[fx.Node, ...] = field(repr=False)
    scale: float = 1.0
    written: str = ""
    tail: tuple[fx.Node, ...] = ()
    passed: tuple[fx.Node, ...] = ()
    branch_first: bool = False
    adds: int = 1
    name: str = ""

    @property
    def add(self) -> fx.Node:
        """The add itself; of a module taken whole, its call."""
        return self.tail[0] if self.tail else self.output

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes that the block stands for; a query of x that others ask as well is not among them."""
        inside = {*self.members, self.output}
        own = [node for node in self.members if not _asked_outside(node, self.skip, inside)]
        return (*self.passed, *own, self.output) if self.kind == "residual" else tuple(own)


@dataclass(frozen=True, eq=False)
class Rejection:
    """A residual add that is kept, the reason, and the node that the reason is about.

    One that is not ``residual`` is a sum of values that come from one, but no skip and branch.
    """

    add: fx.Node
    reason: Reason
    node: object = None
    name: str = ""
    residual: bool = True

    @property
    def text(self) -> str:
        """The reason in words."""
        return self.reason.text(self.node)


def collect(
    flow: Dataflow,
    kind: str,
    skip: fx.Node,
    value: fx.Node,
    output: fx.Node,
    tail: tuple[fx.Node, ...] = (),
    scale: float = 1.0,
    written: str = "",
    home: str | None = None,
) -> Block:
    """Collect the members, sides and escapes of the block from ``skip`` to ``value``, of the module ``home``."""
    members = _paths(flow, skip, value, tail)
    _absorb(flow, skip, members, flow.position[output], output.meta[SCOPE].path if home is None else home)
    return _made(flow, Block(kind, skip, value, output, (), (), (), scale, written, tail), members)


def with_members(flow: Dataflow, block: Block, more: set[fx.Node]) -> Block:
    """The block with more nodes in it, and all that take items of them."""
    members = {*block.members, *more}
    return _made(flow, block, members | {user for node in more for user in node.users if _unpacks(user)})


def _made(flow: Dataflow, block: Block, members: set[fx.Node]) -> Block:
    """The block with these members, and the sides and escapes that they have."""
    ordered = tuple(sorted(members, key=flow.position.__getitem__))
    skip, output = block.skip, block.output
    sides = {
        source: None
        for node in ordered
        for source in node.all_input_nodes
        if source not in members and source is not skip
    }
    inside = members | {output}
    handed = [node for node in ordered if any(user not in inside for user in node.users)]
    ends = set[fx.Node]() if block.kind == "residual" else {block.value}
    escapes = tuple(node for node in handed if node not in ends and not _asked_outside(node, skip, inside))
    return replace(block, members=ordered, sides=tuple(sides), escapes=escapes)


def _asked_outside(node: fx.Node, skip: fx.Node, inside: set[fx.Node]) -> bool:
    of_x = operations.is_query(node) and node.all_input_nodes[0] is skip
    return of_x and any(user not in inside for user in node.users)


def _paths(flow: Dataflow, skip: fx.Node, value: fx.Node, tail: tuple[fx.Node, ...]) -> set[fx.Node]:
    """All nodes on paths from ``skip`` to ``value``, then ``tail``."""
    members: set[fx.Node] = set(tail)
    pending = [value] if not tail else list(tail[0].all_input_nodes)
    while pending:
        node = pending.pop()
        if node in members or node is skip or skip not in flow.ancestors[node]:
            continue
        members.add(node)
        pending += [] if operations.is_query(node) or operations.is_like_factory(node) else flow.inputs(node, skip)
    return members


def _absorb(flow: Dataflow, skip: fx.Node, members: set[fx.Node], end: int, home: str) -> None:
    """Take in what belongs to the members alone: values only they use, queries, checks, own writes.

    A value computed before the branch starts is taken in where the block's own module computes it; if the add runs in
    the root, where a module does that members run in.
    """
    own = {home} if home else {node.meta[SCOPE].path.partition(".")[0] for node in members}
    inner, output = flow.nodes[flow.position[skip] + 1 : end], flow.nodes[end]
    first = min((flow.position[node] for node in members), default=end)
    changed = True
    while changed:
        before = len(members)
        for node in reversed(inner):
            near = flow.position[node] > first or node.op == "get_attr" or any(_within(node, path) for path in own)
            if node not in members and near and _serves(flow, node, skip, members):
                members.add(node)
        for node in inner:
            if node not in members and _follows(flow, node, skip, members):
                members.add(node)
        members |= {user for node in members - {output} for user in node.users if _unpacks(user)}
        changed = len(members) > before
    # Of several values from outside the block takes the items it needs: autograd sees tensors only.
    members -= {node for node in members if operations.takes_item(node) and _from_outside(node, skip, members)}


def _from_outside(node: fx.Node, skip: fx.Node, members: set[fx.Node]) -> bool:
    source = node.all_input_nodes[0]
    return source not in members and source is not skip


def _within(node: fx.Node, home: str) -> bool:
    path = node.meta[SCOPE].path
    return bool(home) and (path == home or path.startswith(f"{home}."))


def _serves(flow: Dataflow, node: fx.Node, skip: fx.Node, members: set[fx.Node]) -> bool:
    """Whether only members use the node's value (a query of x is taken in by each who needs it)."""
    users = [user for user in node.users if not _only_writes(flow, user, node)]
    if not users or node.op == "placeholder" or _unpacks_number(node):
        return False
    if all(user in members for user in users):
        return True
    scalar = operations.is_query(node) and node.all_input_nodes[0] is skip
    return scalar and any(user in members for user in users)


def _unpacks_number(node: fx.Node) -> bool:
    """Whether the node takes a number out of a lifted one: what a compiler knows of it is lost on a detached copy."""
    inputs = node.all_input_nodes
    return len(inputs) == 1 and inputs[0].op == "placeholder" and inputs[0].meta.get(LIFTED) == "number"


def _only_writes(flow: Dataflow, node: fx.Node, value: fx.Node) -> bool:
    """Whether the node does nothing but write to the memory of ``value``, or is a view for such writes alone."""
    if flow.memory[node] is flow.memory[value] and node.users and node not in flow.written:
        return all(_only_writes(flow, user, value) for user in node.users)
    targets = flow.written.get(node, ())
    return not node.users and any(flow.memory[target] is flow.memory[value] for target in targets)


def _follows(flow: Dataflow, node: fx.Node, skip: fx.Node, members: set[fx.Node]) -> bool:
    """Whether the node only asks, checks or writes what the members hold."""
    sources = node.all_input_nodes
    if not any(source in members for source in sources):
        return False
    if operations.is_query(node):
        return True
    if node.users:
        return flow.memory[node] in members and _only_writes(flow, node, flow.memory[node])
    if operations.is_assertion(node):
        return all(source in members or source is skip for source in sources)
    return any(flow.memory[target] in members for target in flow.written.get(node, ()))


def _unpacks(node: fx.Node) -> bool:
    """Whether the node takes one of several values, which leave a block one by one: autograd sees tensors only."""
    if not operations.takes_item(node):
        return False
    return all(operations.takes_item(user) for user in node.all_input_nodes[0].users)
