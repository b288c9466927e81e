"""Named: calls of modules that the caller named to be blocks, as a capture has marked them.

Known limits: of modules inside one another that are named both, the outer one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mfx.errors import Reason
from mfx.find.block import Block, Rejection, collect
from mfx.find.check import check
from mfx.find.far import Far
from mfx.find.match import match_sum
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import GIVEN, SHAPE, TAKEN


@dataclass(frozen=True)
class Call:
    """One call of a module: ``value = module(x)``."""

    path: str
    x: fx.Node
    value: fx.Node


def calls_of(graph: fx.Graph) -> tuple[Call, ...]:
    """The marked calls of ``graph``, in order of their values."""
    takers = {number: node for node in graph.nodes for number in node.meta.get(TAKEN, ())}
    given = [(node, *node.meta[GIVEN]) for node in graph.nodes if GIVEN in node.meta and node.op != "placeholder"]
    return tuple(Call(path, takers[number], _first(node)) for node, number, path in given if number in takers)


def _first(node: fx.Node) -> fx.Node:
    """The value of a call, or the first of several: what is only ever indexed, and not known to be one tensor."""
    if SHAPE in node.meta or not node.users or not all(operations.takes_item(user) for user in node.users):
        return node
    return next((user for user in node.users if user.args[1] == 0), node)


def named_blocks(flow: Dataflow, calls: tuple[Call, ...], kind: str) -> dict[fx.Node, Block | Rejection]:
    """The block of each marked call, by the node that it ends in."""
    found: dict[fx.Node, Block | Rejection] = {}
    for call in calls:
        add = own_add(flow, call.x, call.value) if kind == "branch" else None
        match = None if add is None else match_sum(flow, add)
        match = match.collected(flow) if isinstance(match, Far) else match
        if match is None:
            match = _named(flow, call, kind)
        found[match.output if isinstance(match, Block) else match.add] = match
    return found


def own_add(flow: Dataflow, x: fx.Node, value: fx.Node) -> fx.Node | None:
    """The graph's own add of ``x`` and ``value``, if there is one."""
    for user in value.users:
        form = flow.adds.get(user)
        if form is not None and {flow.source(form.left), flow.source(form.right)} == {flow.source(x), value}:
            return user
    return None


def _named(flow: Dataflow, call: Call, kind: str) -> Block | Rejection:
    skip = flow.source(call.x)
    if call.value is skip or skip not in flow.ancestors[call.value]:
        return Rejection(call.value, Reason.PROJECTION, call.value)
    return check(flow, collect(flow, kind, skip, call.value, call.value, home=call.path), named=True)
