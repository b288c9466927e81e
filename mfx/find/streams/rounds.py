"""Streams: states that read each other, as one state of which their blocks are the blocks.

Text and picture tokens of a diffusion transformer, nodes and edges of a graph network: each has its residual adds, but
no chain of one of them can run before or after a chain of another.  So a graph is made in which they are one value
(:mod:`mfx.rule.streams`), with a velocity for each since it has one for each element:

1. *tracks* are the blocks of one stream, each from the output of the one before; tracks that read each other's states
   belong together;
2. their blocks form *rounds*: one of each track, where these read the states before them alone; else so many, in order,
   that each stream has been updated;
3. between rounds stands the joined state X.  A round is a wrapped block, ``F(X) = G(X) - X``, marked as the call of a
   named module (:mod:`mfx.find.whole.named`), so that the rest of the house sees a chain like any other;
4. all else stays as it is, and where it was as far as values allow.  Where they do not, and the order of random numbers
   or writes would change, nothing is joined.

A round that updates every stream once, from the states before it, is the recurrence of each add by itself; in any other
the adds within are those of the model, and the momentum is that of the round.

Known limits: streams of one dtype; a round has to update all of them, so blocks before, between and after full rounds
stay in chains of their own.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
from torch import fx

from mfx.find.block import Block
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import DTYPE, SCOPE, SHAPE

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
    found = [_rounds(flow, [tracks[t] for t in sorted(knot)]) for knot in knots]
    return [run for run in found if len(run.members) > 1 and _is_sound(flow, run)]


def _tracks(flow: Dataflow, blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of each stream; of those inside one another the outermost."""
    starting: dict[fx.Node, Block] = {}
    for block in sorted(blocks, key=_position(flow)):
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


@dataclass(frozen=True, eq=False)
class _Round:
    """A round: the versions of all tracks before and after it, its members and blocks."""

    begin: tuple[int, ...]
    end: tuple[int, ...]
    members: frozenset[fx.Node]
    blocks: tuple[Block, ...]


def _round(
    flow: Dataflow, tracks: Sequence[Sequence[Block]], begin: tuple[int, ...], known: set[fx.Node]
) -> _Round | None:
    """The next round: a block of each track, if they read the states before it alone, else as many as it takes."""
    states = _versions(tracks)
    left = sorted((b for track, v in zip(tracks, begin, strict=True) for b in track[v:]), key=_position(flow))
    first = [track[v] for track, v in zip(tracks, begin, strict=True) if v < len(track)]
    if len(first) < len(tracks):
        return None
    read = {states[node] for block in first for node in _between(flow, block.output, states, known)[1]}
    blocks = first if all(begin[t] == version for t, version in read) else []
    end, members = [*begin], set[fx.Node]()
    for block in [*blocks] or left:
        members |= _between(flow, block.output, states, known)[0]
        t, end[t] = states[block.output]
        blocks += [] if block in blocks else [block]
        if all(map(operator.lt, begin, end)) and _is_clean(flow, tracks, end, states):
            break
    return _Round(begin, tuple(end), frozenset(members), tuple(blocks))


def _is_clean(
    flow: Dataflow, tracks: Sequence[Sequence[Block]], end: Sequence[int], states: Mapping[fx.Node, State]
) -> bool:
    """Whether the block of each track after a round reads nothing from before the round's end."""
    after = [track[v] for track, v in zip(tracks, end, strict=True) if v < len(track)]
    read = {states[node] for block in after for node in _between(flow, block.output, states)[1]}
    return all(version >= end[t] for t, version in read)


def _first(flow: Dataflow, tracks: Sequence[Sequence[Block]]) -> tuple[int, ...]:
    """The version of each track in which it first reads another one, or is read; or before, in the same module."""
    states = _versions(tracks)
    first = [len(track) for track in tracks]
    for t, track in enumerate(tracks):
        for i, block in enumerate(track):
            others = {states[node] for node in _between(flow, block.output, states)[1] if states[node][0] != t}
            for u, version in {*others, (t, i if others else len(track))}:
                first[u] = min(first[u], version)
    home = common_path(track[v] for track, v in zip(tracks, first, strict=True) if v < len(track))
    for t, track in enumerate(tracks):
        while first[t] and common_path([track[first[t] - 1]]).split(".")[: len(home.split("."))] == home.split("."):
            first[t] -= 1
    return tuple(first)


def common_path(blocks: Iterable[Block]) -> str:
    """The module that runs all adds of some blocks."""
    levels = zip(*(block.add.meta[SCOPE].path.split(".") for block in blocks), strict=False)
    return ".".join(names[0] for names in itertools.takewhile(lambda names: len({*names}) == 1, levels))


def _rounds(flow: Dataflow, tracks: Sequence[Sequence[Block]]) -> Rounds:
    """All full rounds through some tracks."""
    found, known, now = list[_Round](), set[fx.Node](), _first(flow, tracks)
    while (here := _round(flow, tracks, now, known)) is not None and all(map(operator.lt, here.begin, here.end)):
        found.append(here)
        known |= here.members
        now = here.end
    bounds = [_first(flow, tracks), *(one.end for one in found)]
    states = tuple(tuple(_states(track)[v] for track, v in zip(tracks, bound, strict=True)) for bound in bounds)
    return Rounds(states, tuple(one.members for one in found), tuple(block for one in found for block in one.blocks))


def _position(flow: Dataflow) -> Callable[[Block], int]:
    return lambda block: flow.position[block.output]


def _is_sound(flow: Dataflow, run: Rounds) -> bool:
    """Whether the streams are alike, as far as that is known, and written to by their own blocks alone."""
    if len({node.meta.get(DTYPE) for nodes in run.states for node in nodes}) > 1:
        return False
    alike = all(len({node.meta.get(SHAPE) for node in stream}) == 1 for stream in zip(*run.states, strict=True))
    writers = {writer for node in run.bounds for writer in flow.writers.get(flow.memory[node], ())}
    return alike and writers <= run.round_of.keys()
