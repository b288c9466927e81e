"""Dataflow: what depends on what in a captured graph, what shares memory, and whose order matters.

One pass over the nodes, in order:

1. ``inputs`` of a node are the nodes it computes from; metadata queries (shape, dtype, ``zeros_like`` ...) cut the data
   flow, so a value built from sizes alone depends on nothing.
2. ``origins`` is the set (as a bit mask) of graph inputs a value is computed from, or that were written into its
   memory before.
3. ``ancestors`` is the set of *skip candidates* a value is computed from, by what was written into its memory, too,
   where that is not a parameter's, a buffer's or an input's.  A candidate is dropped from the
   sets after the last add that reads it, so on a chain of blocks the sets stay small and the pass linear.
4. ``memory``, ``writers``, ``stale_reads`` and ``resources`` are those of :mod:`mfx.graph.resources`.

:class:`Dataflow` is the one door to what a node is, as far as that depends on its graph.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from mfx.graph import operations
from mfx.graph.notes import LIFTED
from mfx.graph.rearranging import before_rearranging, rearranged, source
from mfx.graph.resources import memory_of, resources_of, stale_reads_of, writers_of, writes
from mfx.graph.sums import Add, Term, add_form, sum_of

_OWNED = ("placeholder", "get_attr")
"""What is there before a graph runs: its order of writes and reads is kept (:mod:`mfx.graph.resources`)."""


@dataclass(frozen=True, eq=False)
class Dataflow:
    """The facts of one graph; nodes are looked up by identity."""

    graph: fx.Graph
    root: nn.Module
    nodes: tuple[fx.Node, ...]
    position: dict[fx.Node, int] = field(repr=False)
    adds: dict[fx.Node, Add] = field(repr=False)
    sums: dict[fx.Node, tuple[Term, ...]] = field(repr=False)
    origins: dict[fx.Node, int] = field(repr=False)
    ancestors: dict[fx.Node, frozenset[fx.Node]] = field(repr=False)
    memory: dict[fx.Node, fx.Node] = field(repr=False)
    written: dict[fx.Node, tuple[fx.Node, ...]] = field(repr=False)
    writers: dict[fx.Node, tuple[fx.Node, ...]] = field(repr=False)
    stale_reads: dict[fx.Node, fx.Node] = field(repr=False)
    resources: dict[fx.Node, frozenset[object]] = field(repr=False)

    def inputs(self, node: fx.Node, after: fx.Node) -> list[fx.Node]:
        """What a node computes from: its inputs, and what has written to their memory since ``after``."""
        found = node.all_input_nodes
        place = self.position.__getitem__
        for owner in dict.fromkeys(map(self.memory.__getitem__, found)):
            writers = self.writers.get(owner, ()) if owner.op not in _OWNED else ()
            start = bisect.bisect_right(writers, place(after), key=place)
            found += writers[start : bisect.bisect_left(writers, place(node), key=place)]
        return found

    def source(self, node: fx.Node) -> fx.Node:
        """The value behind nodes that do nothing."""
        return source(node, self.root)

    def keeps_shape(self, node: fx.Node) -> bool:
        """Whether the node's value surely has its first input's shape."""
        return operations.keeps_shape(node, self.root)

    def may_draw(self, node: fx.Node) -> bool:
        """Whether the node may draw random numbers as it is called."""
        return operations.is_random(node, self.root) and not operations.draws_nothing(node)

    def sees_grad_mode(self, node: fx.Node) -> bool:
        """Whether the node may compute otherwise where gradients are off."""
        return operations.sees_grad_mode(node, self.root)

    def has_parameters(self, node: fx.Node) -> bool:
        """Whether the node is a parameter, or calls a module that has some."""
        if node.op == "placeholder":
            return node.meta.get(LIFTED) == "parameter"
        if node.op == "get_attr":
            return isinstance(get_attribute(self.root, str(node.target)), nn.Parameter)
        if node.op == "call_module":
            return next(self.root.get_submodule(str(node.target)).parameters(), None) is not None
        return False


def get_attribute(root: nn.Module, path: str) -> object:
    """The parameter, buffer or module at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def analyse(graph: fx.Graph, root: nn.Module, whole: Mapping[fx.Node, fx.Node] | None = None) -> Dataflow:
    """The facts of ``graph``; ``whole`` are the values of module calls that are blocks, with their x."""
    nodes = tuple(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    adds = {node: form for node in nodes if (form := add_form(node)) is not None}
    sums = {node: terms for node in nodes if (terms := sum_of(node, root))}
    last_read = _last_reads(nodes, position, adds, root, whole or {})
    for node, terms in sums.items():
        for skip in (skip for term in terms for skip in term.path):
            last_read[skip] = max(position[node], last_read.get(skip, 0))
    memory = memory_of(nodes, root)
    written = {node: found for node in nodes if (found := writes(node, root))}
    origins, ancestors = _flow(nodes, position, last_read, memory, written)
    writers = writers_of(memory, written)
    return Dataflow(
        graph=graph,
        root=root,
        nodes=nodes,
        position=position,
        adds=adds,
        sums=sums,
        origins=origins,
        ancestors=ancestors,
        memory=memory,
        written=written,
        writers=writers,
        stale_reads=stale_reads_of(nodes, position, adds, memory),
        resources=resources_of(nodes, root, memory, writers),
    )


def _last_reads(
    nodes: tuple[fx.Node, ...],
    position: dict[fx.Node, int],
    adds: dict[fx.Node, Add],
    root: nn.Module,
    whole: Mapping[fx.Node, fx.Node],
) -> dict[fx.Node, int]:
    """Each skip candidate, with the position of the last add (or whole block) that reads it."""
    last: dict[fx.Node, int] = {}
    for node in nodes:
        form = adds.get(node)
        if form is not None:
            end = position[(node, *rearranged(node))[-1]]
            for operand in (form.left, form.right):
                skip = source(operand, root)
                last[skip] = max(position[node], last.get(skip, 0))
                for first in before_rearranging(skip)[:1]:
                    x = source(first.all_input_nodes[0], root)
                    last[x] = max(end, last.get(x, 0))
        if node in whole:
            skip = source(whole[node], root)
            last[skip] = max(position[node], last.get(skip, 0))
    return last


def _flow(
    nodes: tuple[fx.Node, ...],
    position: dict[fx.Node, int],
    last_read: dict[fx.Node, int],
    memory: dict[fx.Node, fx.Node],
    written: dict[fx.Node, tuple[fx.Node, ...]],
) -> tuple[dict[fx.Node, int], dict[fx.Node, frozenset[fx.Node]]]:
    origins: dict[fx.Node, int] = {}
    ancestors: dict[fx.Node, frozenset[fx.Node]] = {}
    contents: dict[fx.Node, int] = {}
    held: dict[fx.Node, frozenset[fx.Node]] = {}
    inputs = 0
    for node in nodes:
        mask, above = 0, frozenset[fx.Node]()
        if node.op == "placeholder" and LIFTED in node.meta:
            pass
        elif node.op == "placeholder":
            mask, inputs = 1 << inputs, inputs + 1
        elif not operations.is_query(node) and not operations.is_like_factory(node):
            for source in node.all_input_nodes:
                mask |= origins[source] | contents.get(memory[source], 0)
                above |= ancestors[source] | held.get(memory[source], frozenset())
            for target in written.get(node, ()):
                contents[memory[target]] = contents.get(memory[target], 0) | mask
                if memory[target].op not in _OWNED:
                    held[memory[target]] = held.get(memory[target], frozenset()) | above
        here = position[node]
        above = frozenset(skip for skip in above if last_read[skip] >= here)
        origins[node] = mask
        ancestors[node] = above | {node} if node in last_read else above
    return origins, ancestors
