"""Pieces: a compiler's graph with chains, of which the inner backend compiles what lies between them.

1. Chains and segments run as Python, as in eager mode, with branches that are compiled (:mod:`mfx.rewrite.compiled`);
   so do switches of modes between them, and numbers that are read of tensors.
2. What lies in between becomes graphs of its own, compiled when they run first, under the modes in force there.
3. What calls them in turn is what Dynamo gets for its graph, so ``fullgraph=True`` holds.

Source: torch/_dynamo/backends/distributed.py (``DDPOptimizer``), which splits graphs where buckets end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import fx

from mfx.graph.notes import SHAPE
from mfx.graph.operations import is_ambient, name_of
from mfx.rewrite import Branches
from mfx.rewrite.switches import all_left, enter, leave
from mfx.torch_versions import is_lifted_number


def in_pieces(gm: fx.GraphModule, branches: Branches) -> Callable[..., Any]:
    """What computes ``gm``: its chains in Python, and what lies between them compiled as branches are."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for python, group in groupby(list(gm.graph.nodes), key=_runs_in_python):
        nodes = list(group)
        if python:
            for node in nodes:
                env[node] = _copied(graph, node, env)
        else:
            _call(graph, gm, nodes, env, branches)
    graph.lint()
    driver = fx.GraphModule(gm, graph).forward

    def run(*inputs: Any) -> Any:
        # What an error leaves switched is put back.
        with all_left(), torch.set_grad_enabled(torch.is_grad_enabled()):
            return driver(*inputs)

    return run


def is_dynamic(values: Sequence[Any]) -> bool | None:
    """Whether a size of a graph's inputs may change; None where that is not known yet, as in ``torch.compile``."""
    changes = any(
        isinstance(value, torch.SymInt)
        or (isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape))
        for value in values
    )
    return True if changes else None


def has_transforms(graph: fx.Graph) -> bool:
    """Whether a transform of ``torch.func`` is entered in the graph."""
    return any(node.op == "call_function" and name_of(node).endswith("_increment_nesting") for node in graph.nodes)


def _runs_in_python(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output") or node.target in (enter, leave) or is_ambient(node):
        return True
    if node.target == "item" or node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return is_lifted_number(source) or _is_ours(source)
    return _is_ours(node)


def _copied(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    """A copy of what runs in Python; autocast is entered and left as our own switches do it."""
    if is_ambient(node) and name_of(node) == "_enter_autocast":
        kind, dtype, enabled = node.args[:3]
        dtype = (dtype or torch.get_autocast_dtype(str(kind))) if enabled else None
        return graph.call_function(enter, (None, None, ((kind, enabled, dtype),)))
    if is_ambient(node) and name_of(node) == "_exit_autocast":
        return graph.call_function(leave)
    return graph.node_copy(node, env.__getitem__)


def _is_ours(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__module__", None) == "mfx"


def _call(
    graph: fx.Graph,
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    env: dict[fx.Node, Any],
    branches: Branches,
) -> None:
    """Add the call of a compiled piece of ``nodes``."""
    piece, taken, given = _piece(nodes)
    compiled = branches(piece)

    def compiled_piece(*inputs: Any) -> Any:
        return compiled(gm, *inputs)

    call = graph.call_function(compiled_piece, tuple(env[node] for node in taken))
    for number, node in enumerate(given):
        env[node] = graph.call_function(operator.getitem, (call, number))


def _piece(nodes: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """``nodes`` as a graph, what it takes, and what it gives."""
    piece, inside = fx.Graph(), set(nodes)
    piece.placeholder("root")
    taken = list(dict.fromkeys(_sources(nodes, inside)))
    given = [node for node in nodes if node.op != "get_attr" and any(user not in inside for user in node.users)]
    env = {node: piece.placeholder(f"input_{number}") for number, node in enumerate(taken)}
    for node, placeholder in env.items():
        placeholder.meta = {note: node.meta[note] for note in (SHAPE, "example_value") if note in node.meta}

    def value(node: fx.Node) -> fx.Node:
        if node not in env:
            env[node] = piece.node_copy(node)
        return env[node]

    for node in nodes:
        if node.op != "get_attr":
            env[node] = piece.node_copy(node, value)
    piece.output(tuple(env[node] for node in given))
    piece.lint()
    return piece, taken, given


def _sources(nodes: Sequence[fx.Node], inside: set[fx.Node]) -> Iterator[fx.Node]:
    for node in nodes:
        yield from (one for one in node.all_input_nodes if one not in inside and one.op != "get_attr")
