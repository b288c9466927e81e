"""Lifted graphs: parameters and buffers are placeholders, as in the graphs that Dynamo hands over.

1. :func:`mark` tells which placeholders are parameters and buffers, and in which module's forward each node ran,
   so that :mod:`mfx.find` sees what it sees in a graph of :mod:`mfx.tracer`.
2. :func:`momentumize_graph` finds, plans and rewrites such a graph.  Every value that a chain uses is an operand
   of its node: the result can be run, or handed on to a compiler.

Source: ``nn_module_stack`` as written by torch/_dynamo/output_graph.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from mfx import operations
from mfx.dataflow import LIFTED
from mfx.errors import CompiledStoredWarning
from mfx.find import Found, find
from mfx.options import Options
from mfx.plan import Chain, Plan, plan
from mfx.random import is_known
from mfx.rewrite import Velocity, rewrite_lifted
from mfx.tracer import RETURNED, SCOPE, Scope


@dataclass(frozen=True, eq=False)
class Lifted:
    """A rewritten lifted graph, with what led to it."""

    module: fx.GraphModule
    found: Found
    plan: Plan


def momentumize_graph(gm: fx.GraphModule, options: Options, velocities: Sequence[Velocity] = ()) -> Lifted:
    """find -> plan -> rewrite for a marked graph; ``gm`` is left as it is.

    A chain with a random operation whose draw a compiler could not repeat keeps its activations; a warning says so.
    """
    found = find(gm.graph, gm, kind=options.kind, only_whole=options.only_whole)
    planned = plan(found, options)
    stored = {chain.index: node for chain in planned.chains for node in _unrepeatable(chain, gm)}
    for index, node in stored.items():
        names = planned.chains[index].names
        warnings.warn(
            f"the chain of blocks {names[0]!r} to {names[-1]!r} keeps its activations: {node.format_node()} may draw "
            "random numbers that a compiler cannot draw a second time in backward. Exclude that block, or draw with "
            "torch's own functions (dropout, rand, bernoulli_ ...)",
            CompiledStoredWarning,
            stacklevel=2,
        )
    return Lifted(rewrite_lifted(found, planned, gm, stored, velocities), found, planned)


def _unrepeatable(chain: Chain, gm: fx.GraphModule) -> Iterator[fx.Node]:
    for block in chain.blocks:
        for node in block.members:
            if operations.is_random(node, gm) and not is_known(operations.name_of(node, gm)):
                yield node


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
