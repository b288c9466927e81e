"""Lifted graphs: parameters and buffers are placeholders, as in the graphs that Dynamo hands over.

1. :func:`mark` tells which placeholders are parameters and buffers, and in which module's forward each node ran,
   so that :mod:`mfx.find` sees what it sees in a graph of :mod:`mfx.tracer`.
2. :func:`momentumize_graph` finds, plans and rewrites such a graph.  Every value that a chain uses is an operand
   of its node: the result can be run, or handed on to a compiler.

Source: ``nn_module_stack`` as written by torch/_dynamo/output_graph.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from mfx.dataflow import LIFTED
from mfx.find import Found, find
from mfx.options import Options
from mfx.plan import Plan, plan
from mfx.rewrite import rewrite_lifted
from mfx.tracer import RETURNED, SCOPE, Scope


@dataclass(frozen=True, eq=False)
class Lifted:
    """A rewritten lifted graph, with what led to it."""

    module: fx.GraphModule
    found: Found
    plan: Plan


def momentumize_graph(gm: fx.GraphModule, options: Options) -> Lifted:
    """find -> plan -> rewrite for a marked graph; ``gm`` is left as it is."""
    found = find(gm.graph, gm)
    planned = plan(found, options)
    return Lifted(rewrite_lifted(found, planned, gm), found, planned)


def mark(graph: fx.Graph, kinds: Mapping[fx.Node, str], modules: Mapping[int, str]) -> None:
    """Note on each node what planning needs.

    Args:
        graph: a graph of torch-level operations with ``nn_module_stack`` in its nodes' meta.
        kinds: ``"parameter"`` or ``"buffer"`` for the placeholders that are one.
        modules: path of each module, by its id.
    """
    calls: dict[str, dict[tuple[str, ...], int]] = {}
    stacks: dict[fx.Node, tuple[Scope, ...]] = {}
    for node in graph.nodes:
        stacks[node] = _scopes(node, modules, calls)
        node.meta[SCOPE] = stacks[node][-1]
        if node in kinds:
            node.meta[LIFTED] = kinds[node]
    for node in graph.nodes:
        left = {scope for scope in stacks[node] for user in node.users if scope not in stacks[user]}
        node.meta[RETURNED] = left


def _scopes(
    node: fx.Node, modules: Mapping[int, str], calls: dict[str, dict[tuple[str, ...], int]]
) -> tuple[Scope, ...]:
    """The module calls in which a node ran, from the root inwards."""
    scopes = [Scope("", 0)]
    chain: tuple[str, ...] = ()
    for key in node.meta.get("nn_module_stack") or {}:
        chain = (*chain, key)
        identity = key.partition("@")[0]
        path = modules.get(int(identity)) if identity.isdigit() else None
        if path:
            seen = calls.setdefault(path, {})
            scopes.append(Scope(path, seen.setdefault(chain, len(seen))))
    return tuple(scopes)
