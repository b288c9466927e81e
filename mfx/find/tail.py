"""Tail: the operations ``h`` after an add that belong to its block, ``y = h(x + f(x))``."""

from __future__ import annotations

from torch import fx

from mfx.find.block import Block, Rejection, collect
from mfx.find.check import check
from mfx.find.far import Far
from mfx.find.match import is_mixed
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import RETURNED, SCOPE, SHAPE, Scope


def wrap(flow: Dataflow, matches: list[Block | Rejection | Far], part: bool = False) -> list[Block | Rejection | Far]:
    """Let each residual block take in the operations after its add that belong to it.

    ``part`` says that the graph is that of a module inside a model, so that what it returns is not the model's output.
    """
    skips = {match.skip for match in matches if not isinstance(match, Rejection)}
    ends: dict[fx.Node, Block] = {}
    wrapped: list[Block | Rejection | Far] = []
    for match in matches:
        if isinstance(match, Block) and (match.kind == "residual" or is_mixed(match)):
            tail = _tail(flow, match, skips, ends.get(match.skip), part)
            if tail:
                nodes = (match.output, *tail)
                grown = collect(flow, "wrapped", match.skip, tail[-1], tail[-1], nodes, 1.0, match.written)
                checked = check(flow, grown)
                match = checked if isinstance(checked, Block) else match
        if isinstance(match, Block):
            ends[match.output] = match
        wrapped.append(match)
    return wrapped


def _tail(flow: Dataflow, block: Block, skips: set[fx.Node], before: Block | None, part: bool) -> tuple[fx.Node, ...]:
    """The operations ``h`` after the add that belong to the block; empty where there are none."""
    path = _single_path(flow, block)
    scope: Scope = block.output.meta[SCOPE]
    if block.output in skips:
        return ()
    for length, node in enumerate(path, 1):
        if node in skips:
            return tuple(path[:length])
    if before is not None and len(before.tail) > 1:
        repeated = [_operation(flow, node) for node in before.tail[1:]]
        if [_operation(flow, node) for node in path[: len(repeated)]] == repeated:
            return tuple(path[: len(repeated)])
    if scope.path or part:
        for length in range(len(path), 0, -1):
            if _is_returned(path[length - 1], scope):
                return tuple(path[:length])
    return ()


def _is_returned(node: fx.Node, scope: Scope) -> bool:
    """Whether the forward that runs in ``scope`` returns the node's value."""
    if not scope.path:
        return any(user.op == "output" for user in node.users)
    return scope in node.meta.get(RETURNED, ())


def _single_path(flow: Dataflow, block: Block) -> list[fx.Node]:
    """The shape-keeping operations that follow the add one by one, each the only consumer."""
    path: list[fx.Node] = []
    node, start = block.output, flow.position[block.skip]
    while True:
        users = [user for user in node.users if not operations.is_query(user)]
        if len(users) != 1 or len(users) != len(node.users):
            return path
        (user,) = users
        others = [source for source in user.all_input_nodes if source is not node]
        foreign = any(flow.origins[source] and flow.position[source] > start for source in others)
        if user.op == "output" or foreign or not _keeps(flow, user, node):
            return path
        path.append(user)
        node = user


def _keeps(flow: Dataflow, node: fx.Node, source: fx.Node) -> bool:
    if not node.args or node.args[0] is not source:
        return False
    if SHAPE in node.meta and SHAPE in source.meta:
        return node.meta[SHAPE] == source.meta[SHAPE]
    return flow.keeps_shape(node)


def _operation(flow: Dataflow, node: fx.Node) -> object:
    constants = tuple(arg for arg in node.args if not isinstance(arg, fx.Node))
    return operations.name_of(node, flow.root), repr(constants), repr(sorted(node.kwargs))
