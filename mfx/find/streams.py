"""Streams: states that read each other, as one state of which their blocks are the blocks.

Text and picture tokens of a diffusion transformer, nodes and edges of a graph network: each has its residual adds, but
no chain of one of them can run before or after a chain of another.  So a graph is made in which they are one value
(:mod:`mfx.rule.streams`), with a velocity for each since it has one for each element:

1. *tracks* are the blocks of one stream, each from the output of the one before; tracks that read each other's states
   belong together;
2. their blocks, in order, form *rounds*: a round ends when each stream has been updated in it;
3. between rounds stands the joined state X.  A round is a wrapped block, ``F(X) = G(X) - X``, marked as the call of a
   named module (:mod:`mfx.find.named`), so that the rest of the house sees a chain like any other;
4. all else stays as it is, and where it was as far as values allow.  Where they do not, and the order of random numbers
   or writes would change, nothing is joined.

A round that updates every stream once, from the states before it, is the recurrence of each add by itself; in any other
the adds within are those of the model, and the momentum is that of the round.

Known limits: streams of one dtype; a round has to update all of them, so blocks before, between and after full rounds
stay in chains of their own.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx

from mfx.find.block import Block
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import DTYPE, FRAMES, MODES, ORIGINAL, SCOPE, SHAPE, STREAMS, TAKEN, Scope, mark_call
from mfx.rule.streams import joined, layout, parted

MOST = 4
"""The most streams that are joined."""

State = tuple[int, int]
"""A track, and the number of blocks of it before."""


@dataclass(frozen=True, eq=False)
class Rounds:
    """Consecutive rounds of ``blocks``: the ``states`` of all streams around each, the ``members`` of each."""

    states: tuple[tuple[fx.Node, ...], ...]
    members: tuple[frozenset[fx.Node], ...]
    blocks: tuple[Block, ...]

    @cached_property
    def bounds(self) -> dict[fx.Node, tuple[int, int]]:
        """For the nodes of streams between rounds: before which round, and of which stream."""
        return {node: (k, number) for k, nodes in enumerate(self.states) for number, node in enumerate(nodes)}

    @cached_property
    def round_of(self) -> dict[fx.Node, int]:
        """The round of each member."""
        return {node: k for k, nodes in enumerate(self.members) for node in nodes}


def rounds_of(flow: Dataflow, blocks: Sequence[Block]) -> list[Rounds]:
    """The rounds of all streams that belong together."""
    tracks = _tracks(flow, blocks)
    states = _versions(tracks)
    coupled = nx.DiGraph()
    for t, track in enumerate(tracks):
        read = {states[node] for block in track for node in _between(flow, block.output, states)[1]}
        coupled.add_edges_from((t, other) for other, version in read if other != t and version > 0)
    knots = (knot for knot in nx.strongly_connected_components(coupled) if 1 < len(knot) <= MOST)
    found = [run for knot in knots for run in _runs(flow, [tracks[t] for t in sorted(knot)])]
    return [run for run in found if _is_sound(flow, run)]


def with_streams(flow: Dataflow, runs: Sequence[Rounds]) -> fx.Graph | None:
    """The graph in which the streams of ``runs`` are joined; None where that would change an order."""
    try:
        return _Joining(flow, runs).graph
    except (nx.NetworkXUnfeasible, _OtherOrder):
        return None


class _OtherOrder(Exception):
    pass


def _tracks(flow: Dataflow, blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of each stream; of those inside one another the outermost."""
    starting: dict[fx.Node, Block] = {}
    for block in sorted(blocks, key=lambda block: flow.position[block.output]):
        starting[block.skip] = block
    outputs = {block.output for block in starting.values()}
    tracks = []
    for block in starting.values():
        if block.skip not in outputs:
            track = [block]
            while track[-1].output in starting:
                track.append(starting[track[-1].output])
            tracks.append(track)
    return [track for track in tracks if len(track) > 1]


def _states(track: Sequence[Block]) -> list[fx.Node]:
    return [track[0].skip, *(block.output for block in track)]


def _versions(tracks: Sequence[Sequence[Block]]) -> dict[fx.Node, State]:
    """The states of all tracks, by node."""
    return {node: (t, i) for t, track in enumerate(tracks) for i, node in enumerate(_states(track))}


def _between(
    flow: Dataflow, output: fx.Node, states: Container[fx.Node], known: Container[fx.Node] = ()
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What computes ``output`` from ``states``, as far as it is not ``known``; and which states those are."""
    seen, read, pending = {output}, set[fx.Node](), [output]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source in states:
                read.add(source)
            elif source not in seen and source not in known:
                seen.add(source)
                pending.append(source)
    members = set[fx.Node]()
    for node in sorted(seen, key=flow.position.__getitem__):
        if any(source in states or source in members for source in node.all_input_nodes):
            members.add(node)
    return members, read


@dataclass
class _Round:
    """A round in the making: the version of each track before it, its members and blocks so far."""

    begin: tuple[int, ...]
    members: set[fx.Node] = field(default_factory=set)
    blocks: list[Block] = field(default_factory=list)


def _runs(flow: Dataflow, tracks: Sequence[Sequence[Block]]) -> list[Rounds]:
    """The runs of full rounds through some tracks."""
    states = _versions(tracks)
    now, known = [0] * len(tracks), set[fx.Node]()
    here, runs = _Round(tuple(now)), [list[_Round]()]
    for block in sorted((block for track in tracks for block in track), key=lambda one: flow.position[one.output]):
        members, read = _between(flow, block.output, states, known)
        if any(version < here.begin[t] for t, version in map(states.__getitem__, read)):
            here = _Round(tuple(now))
            runs.append([])
        known |= members
        here.members |= members
        here.blocks.append(block)
        t, now[t] = states[block.output]
        if all(map(operator.lt, here.begin, now)):
            runs[-1].append(here)
            here = _Round(tuple(now))
    return [_rounds(tracks, run) for run in runs if len(run) > 1]


def _rounds(tracks: Sequence[Sequence[Block]], run: Sequence[_Round]) -> Rounds:
    begins = [one.begin for one in run]
    updated = [_versions(tracks)[block.output] for block in run[-1].blocks]
    begins.append(tuple(max([v, *(i for t, i in updated if t == track)]) for track, v in enumerate(begins[-1])))
    states = tuple(tuple(_states(tracks[t])[v] for t, v in enumerate(begin)) for begin in begins)
    members = tuple(frozenset(one.members) for one in run)
    return Rounds(states, members, tuple(block for one in run for block in one.blocks))


def _is_sound(flow: Dataflow, run: Rounds) -> bool:
    """Whether the streams are alike, as far as that is known, and written to by their own blocks alone."""
    if len({node.meta.get(DTYPE) for nodes in run.states for node in nodes}) > 1:
        return False
    alike = all(len({node.meta.get(SHAPE) for node in stream}) == 1 for stream in zip(*run.states, strict=True))
    writers = {writer for node in run.bounds for writer in flow.writers.get(flow.memory[node], ())}
    return alike and writers <= run.round_of.keys()


Item = "fx.Node | tuple[int, int]"
"""A node of the original graph, or the joined state of a run before a round."""


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
        self.parts: dict[tuple[int, int, bool], fx.Node] = {}
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
            path = self._path(r, k)
            scope = nodes[-1].meta[SCOPE]
            state.meta[SCOPE] = scope if scope.path == path else Scope(path, 0)
            mark_call(self.calls, path, self.states[r, k - 1], state)

    def _path(self, r: int, k: int) -> str:
        """The module that runs all adds of the round before a state."""
        run = self.runs[r]
        adds = [block.add for block in run.blocks if run.round_of[block.add] == k - 1]
        levels = zip(*(add.meta[SCOPE].path.split(".") for add in adds), strict=False)
        return ".".join(names[0] for names in itertools.takewhile(lambda names: len({*names}) == 1, levels))

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
        inside = self.runs[r].round_of.get(reader) == k
        if (r, k, inside) not in self.parts:
            self.parts[r, k, inside] = self._call(reader, parted, self.states[r, k], self.layouts[r])
        part = self._call(reader, operator.getitem, self.parts[r, k, inside], self.bounds[source][2])
        part.meta.update({note: source.meta[note] for note in (SHAPE, DTYPE) if note in source.meta})
        return part

    def _call(self, near: fx.Node, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call that runs where ``near`` does."""
        node = self.graph.call_function(function, args, kwargs)
        node.meta = {note: near.meta[note] for note in (SCOPE, MODES, FRAMES) if note in near.meta}
        return node
