"""Splice: leave out what is dead, take a part of a graph out, put one back.

:func:`part` takes nodes out; what they read from elsewhere become placeholders, what others read of them results.
:func:`join` puts a graph made of it in their place.  The nodes must be consecutive but for placeholders, as those are
that a tracer added during one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx, nn

from mfx.graph.operations import is_ambient, is_assertion, is_known, is_random
from mfx.graph.resources import writes


def drop_dead(graph: fx.Graph, root: nn.Module) -> None:
    """Leave out values that nobody uses and whose computation has no effect."""
    for node in reversed(list(graph.nodes)):
        if not node.users and is_pure(node, root):
            graph.erase_node(node)


def is_pure(node: fx.Node, root: nn.Module) -> bool:
    """Whether leaving the node out, where nobody uses it, changes nothing at all."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    return not (is_assertion(node) or is_ambient(node) or is_random(node, root) or writes(node, root)) and (
        node.op == "call_method" or is_known(node)
    )


def part(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], further: Iterable[fx.Node] = ()
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """``nodes`` of a graph as a graph of their own, and the placeholder there for each value they take.

    The values of ``further`` nodes become placeholders as well.  Its results are the values used elsewhere.
    """
    graph = fx.Graph()
    inside = set(nodes)
    taken = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    taken.update(dict.fromkeys(further))
    inputs = {source: graph.placeholder(source.name) for source in taken}
    env = dict(inputs)
    for source, placeholder in inputs.items():
        placeholder.meta = dict(source.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in _used_outside(nodes)))
    return fx.GraphModule(gm, graph), inputs


def join(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], inner: fx.Graph, inputs: dict[fx.Node, fx.Node]
) -> fx.GraphModule:
    """``gm`` with ``inner``, made of what :func:`part` gave, in the place of ``nodes``."""
    graph = fx.Graph()
    inside, outside = set(nodes), _used_outside(nodes)
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node not in inside:
            env[node] = graph.node_copy(node, env.__getitem__)
        elif node is nodes[0]:
            here: dict[fx.Node, fx.Node] = {}
            placeholders = inner.find_nodes(op="placeholder")
            for placeholder, source in zip(placeholders, inputs, strict=True):
                here[placeholder] = env[source]
            results = graph.graph_copy(inner, here)
            env.update(zip(outside, results, strict=True))  # type: ignore[arg-type]
    graph.lint()
    return fx.GraphModule(gm, graph)


def _used_outside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]
