"""Joining: the graph in which streams are one value between rounds.

1. Nodes and joined states get an order that respects all inputs, and that of the original where it can; where random
   numbers or writes would come in another order, there is no such graph.
2. They are copied in that order.  What reads a stream from between two rounds reads it from the joined state there, but
   for the round that makes it; each round, and all else, takes the state apart by itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from mfx.find.streams.rounds import Rounds, common_path
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import DTYPE, FRAMES, MODES, ORIGINAL, SCOPE, SHAPE, STREAMS, TAKEN, Scope, mark_call
from mfx.rule.streams import joined, layout, parted


def with_streams(flow: Dataflow, runs: Sequence[Rounds]) -> fx.Graph | None:
    """The graph in which the streams of ``runs`` are joined; None where that would change an order."""
    try:
        return _Joining(flow, runs).graph
    except (nx.NetworkXUnfeasible, _OtherOrder):
        return None


class _OtherOrder(Exception):
    pass


class _Joining:
    """Builds the graph: an order first, then one walk."""

    def __init__(self, flow: Dataflow, runs: Sequence[Rounds]) -> None:
        self.flow, self.runs = flow, runs
        self.bounds = {node: (r, *place) for r, run in enumerate(runs) for node, place in run.bounds.items()}
        self.written = {block.add for run in runs for block in run.blocks if block.written}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[int, tuple[fx.Node, ...]] = {}
        self.states: dict[tuple[int, int], fx.Node] = {}
        self.parts: dict[tuple[int, int, int | None], fx.Node] = {}
        self.calls = max((number for node in flow.nodes for number in node.meta.get(TAKEN, ())), default=0)
        for item in self._order():
            if isinstance(item, tuple):
                self._join(*item)
            else:
                self._copy(item)
        self.graph.lint()

    def _place(self, reader: fx.Node, source: fx.Node) -> tuple[int, int] | None:
        """The joined state that ``reader`` has ``source`` from, if it has it from one."""
        if source not in self.bounds:
            return None
        r, k, _ = self.bounds[source]
        here = self.runs[r].round_of.get(reader)
        # A round reads what it makes itself as it is, and so do those outside what was before all rounds.
        return None if (here is None and k == 0) or here == k - 1 else (r, k)

    def _order(self) -> list[Any]:
        """Nodes and joined states, in an order that respects all inputs, and the original where it can."""
        position = self.flow.position
        after: dict[Any, float] = dict(position)
        edges = nx.DiGraph()
        for r, run in enumerate(self.runs):
            for k, nodes in enumerate(run.states):
                after[r, k] = max(map(position.__getitem__, nodes)) + 0.5
                edges.add_edges_from((node, (r, k)) for node in nodes)
                edges.add_edge((r, 0), (r, k)) if k else None
        for node in self.flow.nodes:
            edges.add_node(node)
            edges.add_edges_from((self._place(node, source) or source, node) for source in node.all_input_nodes)
        order = list(nx.lexicographical_topological_sort(edges, after.__getitem__))
        held: dict[object, int] = {}
        for node in order:
            for resource in self.flow.resources.get(node, ()):
                if held.get(resource, -1) > position[node]:
                    raise _OtherOrder
                held[resource] = position[node]
        return order

    def _join(self, r: int, k: int) -> None:
        """Add the joined state before round k."""
        nodes = self.runs[r].states[k]
        if k == 0:
            self.layouts[r] = tuple(self._call(node, layout, self.env[node]) for node in nodes)
        state = self._call(nodes[-1], joined, self.layouts[r], *map(self.env.__getitem__, nodes))
        sizes = [node.meta[SHAPE] for node in nodes if SHAPE in node.meta]
        state.meta[STREAMS] = nodes
        if len(sizes) == len(nodes):
            known = all(isinstance(size, int) for shape in sizes for size in shape)
            state.meta[SHAPE] = (sum(math.prod(shape) for shape in sizes) if known else "all of the streams",)
            state.meta[DTYPE] = nodes[0].meta[DTYPE]
        self.states[r, k] = state
        if k:
            self.calls += 1
            blocks = self.runs[r].blocks
            path = common_path(block for block in blocks if self.runs[r].round_of[block.add] == k - 1)
            scope = nodes[-1].meta[SCOPE]
            state.meta[SCOPE] = scope if scope.path == path else Scope(path, 0)
            mark_call(self.calls, path, self.states[r, k - 1], state)

    def _copy(self, node: fx.Node) -> None:
        """Add a node of the original."""
        if node in self.written:
            form = self.flow.adds[node]
            left, right = self._value(node, form.left), self._value(node, form.right)
            total = self._call(node, torch.add, left, right, alpha=form.scale)
            self.env[node] = self._call(node, torch.Tensor.type_as, total, left)
            self.env[node].meta = dict(node.meta)
        else:
            self.env[node] = self.graph.node_copy(node, lambda source: self._value(node, source))
        self.env[node].meta[ORIGINAL] = node

    def _value(self, reader: fx.Node, source: fx.Node) -> fx.Node:
        place = self._place(reader, source)
        if place is None:
            return self.env[source]
        r, k = place
        here = self.runs[r].round_of.get(reader)
        if (r, k, here) not in self.parts:
            self.parts[r, k, here] = self._call(reader, parted, self.states[r, k], self.layouts[r])
        part = self._call(reader, operator.getitem, self.parts[r, k, here], self.bounds[source][2])
        part.meta.update({note: source.meta[note] for note in (SHAPE, DTYPE) if note in source.meta})
        return part

    def _call(self, near: fx.Node, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call that runs where ``near`` does."""
        node = self.graph.call_function(function, args, kwargs)
        node.meta = {note: near.meta[note] for note in (SCOPE, MODES, FRAMES) if note in near.meta}
        return node
