"""Segments: what lies between chains, cut into pieces that are recomputed from what goes into them.

1. The nodes between two chains, in the order that they will run in, are a *stretch*.  It may be cut where no memory
   that was made before is written to after, since a recomputation would find other values there.
2. A segment keeps what it makes and others read; what it saves inside is there while it is recomputed.  So of all ways
   to cut, with pieces of at most some bytes inside, the one that keeps least is taken (dynamic programming over the
   places where few bytes cross); a piece for which that is not worth while stays as it is.
3. The bound on what is inside is the one for which both together are least.

Reference: Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174,
section 4.
Known limits: segments are recomputed from their ends alone, not from one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from mfx.find import Block
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import LIFTED, SCOPE
from mfx.graph.resources import moves_statistics

_ENDS = 400
"""The most places to cut that are compared in one stretch."""


@dataclass(frozen=True, eq=False)
class Prices:
    """What the nodes of a graph cost.

    ``saved`` are the bytes that each keeps for backward, ``sizes`` those of its value, ``work`` that of computing it
    (in FLOPs); ``containers`` have several tensors as their value; ``barred`` ones cannot be run again where the graph
    will run.
    """

    saved: Mapping[fx.Node, int]
    sizes: Mapping[fx.Node, int]
    work: Mapping[fx.Node, float]
    containers: frozenset[fx.Node] = frozenset()
    barred: frozenset[fx.Node] = frozenset()

    def saved_by(self, nodes: Sequence[fx.Node]) -> int:
        """The bytes that some nodes keep."""
        return sum(self.saved.get(node, 0) for node in nodes)

    def work_of(self, nodes: Sequence[fx.Node]) -> float:
        """What it takes to compute some nodes."""
        return sum(self.work.get(node, 0.0) for node in nodes)


def segments_of(flow: Dataflow, order: Sequence[fx.Node | int], prices: Prices) -> tuple[Block, ...]:
    """The segments outside of chains, in ``order``, that together keep and hold least."""
    values = _Values.of(flow, order, prices)
    stretches = [_Stretch.of(flow, order, part, values, prices) for part in _stretches(order)]
    whole = sum(stretch.inside[-1] for stretch in stretches)
    found = [_cut(stretches, whole / 2**half) for half in range(12)]
    _, pieces = min(found, key=lambda one: one[0])
    made = (_block(flow, _nodes(order, piece), index) for index, piece in enumerate(pieces))
    return tuple(block for block in made if block is not None)


def _nodes(order: Sequence[fx.Node | int], piece: tuple[int, int]) -> list[fx.Node]:
    """The nodes from one place to another, between which no chain stands."""
    return [item for item in order[slice(*piece)] if isinstance(item, fx.Node)]


def _cut(stretches: Sequence[_Stretch], most: float) -> tuple[int, list[tuple[int, int]]]:
    """Bytes kept, and inside the largest piece, where none has more than ``most`` inside; and the pieces."""
    cuts = [stretch.cut(most) for stretch in stretches]
    held = max((inside for _, inside, _ in cuts), default=0)
    return sum(kept for kept, _, _ in cuts) + held, [piece for _, _, pieces in cuts for piece in pieces]


def _stretches(order: Sequence[fx.Node | int]) -> Iterator[range]:
    """The places between chains."""
    ends = [place for place, item in enumerate(order) if isinstance(item, int)]
    for before, after in itertools.pairwise([-1, *ends, len(order)]):
        if after - before > 1:
            yield range(before + 1, after)


@dataclass(frozen=True, eq=False)
class _Values:
    """Memory in the order of execution: where each is made, read last and written to last, by its owner."""

    place: dict[fx.Node, int]
    made: dict[fx.Node, int]
    read: dict[fx.Node, int]
    written: dict[fx.Node, int]
    sizes: dict[fx.Node, int]

    @staticmethod
    def of(flow: Dataflow, order: Sequence[fx.Node | int], prices: Prices) -> _Values:
        values = _Values({item: at for at, item in enumerate(order) if isinstance(item, fx.Node)}, {}, {}, {}, {})
        for node in flow.nodes:
            owner = flow.memory[node]
            if node in values.place and not _is_own(owner):
                values.made.setdefault(owner, values.place[node] if owner in values.place else -1)
                values.sizes[owner] = max(values.sizes.get(owner, 0), prices.sizes.get(node, 0))
            for user in node.users:
                # What a chain reads is kept for it, wherever it stands.
                values.read[owner] = max(values.read.get(owner, 0), values.place.get(user, len(order)))
        for owner, writers in flow.writers.items():
            places = [values.place[writer] for writer in writers if writer in values.place]
            if places and not _is_own(owner):
                values.made.setdefault(owner, -1)
                values.written[owner] = max(places)
        return values


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Nodes between two chains.

    ``ends`` are the places where they may be cut; ``inside`` the bytes saved before each; ``born`` has for each gap
    between two the last reader and the size of what is made there; ``barred`` whether it is to stay as it is.
    """

    ends: list[int]
    inside: list[int]
    born: list[list[tuple[int, int]]]
    barred: list[bool]

    @staticmethod
    def of(flow: Dataflow, order: Sequence[fx.Node | int], part: range, values: _Values, prices: Prices) -> _Stretch:
        ends = _ends(flow, _nodes(order, (part.start, part.stop)), part, values, prices)
        owners: dict[int, list[tuple[int, int]]] = {}
        for owner, made in values.made.items():
            owners.setdefault(made, []).append((values.read.get(owner, 0), values.sizes.get(owner, 0)))
        inside, born, barred = [0], [], []
        for gap in itertools.pairwise(ends):
            nodes = _nodes(order, gap)
            inside.append(inside[-1] + prices.saved_by(nodes))
            barred.append(any(node in prices.barred or _bars(flow, node) for node in nodes))
            born.append([value for place in range(*gap) for value in owners.get(place, ())])
        return _Stretch(ends, inside, born, barred)

    def cut(self, most: float) -> tuple[int, int, list[tuple[int, int]]]:
        """Bytes kept, those inside the largest piece, and the pieces to recompute, by their places."""
        best: list[tuple[int, int, bool]] = [(0, 0, False)]
        for last in range(1, len(self.ends)):
            # What stays as it is keeps what it saves, and what a segment after it may read.
            plain = self.inside[last] - self.inside[last - 1] + self._leaving(last - 1, last)
            found = (best[last - 1][0] + plain, last - 1, False)
            kept = 0
            for first in range(last - 1, -1, -1):
                inside = self.inside[last] - self.inside[first]
                kept += self._leaving(first, last)
                if inside > most or self.barred[first]:
                    break
                if kept < inside and best[first][0] + kept < found[0]:
                    found = (best[first][0] + kept, first, True)
            best.append(found)
        return best[-1][0], *self._pieces(best)

    def _leaving(self, gap: int, last: int) -> int:
        """Bytes of what is made in a gap and read after an end."""
        return sum(size for read, size in self.born[gap] if read >= self.ends[last])

    def _pieces(self, best: Sequence[tuple[int, int, bool]]) -> tuple[int, list[tuple[int, int]]]:
        pieces, held, last = [], 0, len(best) - 1
        while last > 0:
            _, first, recomputed = best[last]
            if recomputed:
                pieces.append((self.ends[first], self.ends[last]))
                held = max(held, self.inside[last] - self.inside[first])
            last = first
        return held, pieces[::-1]


def _ends(flow: Dataflow, nodes: list[fx.Node], part: range, values: _Values, prices: Prices) -> list[int]:
    """The places where a stretch may be cut: of several beside each other, the one where fewest bytes cross."""
    crossing, closed = [0] * (len(part) + 2), [0] * (len(part) + 2)

    def add(counts: list[int], amount: int, first: int, last: int) -> None:
        first, last = max(first, part.start), min(last, part.stop)
        if first <= last:
            counts[first - part.start] += amount
            counts[last + 1 - part.start] -= amount

    for owner, made in values.made.items():
        add(closed, 1, made + 1, values.written.get(owner, -1))
        add(crossing, values.sizes.get(owner, 0), made + 1, values.read.get(owner, -1))
    for node in prices.containers & values.place.keys():
        readers = [values.place.get(user, part.stop) for user in node.users]
        add(closed, 1, values.place[node] + 1, max(readers, default=-1))
    shut, width = list(itertools.accumulate(closed)), list(itertools.accumulate(crossing))
    bars = [place for place, node in enumerate(nodes) if node in prices.barred or _bars(flow, node)]
    around = {end for place in bars for end in (place, place + 1)}
    ends = [place for place in range(len(part) + 1) if not shut[place]]
    several = max(1, -(-len(ends) // _ENDS))  # a stretch may have no end at all
    cheap = {min(ends[at : at + several], key=width.__getitem__) for at in range(0, len(ends), several)}
    cheap |= {0, len(part)} | around & set(ends)
    return [part.start + place for place in sorted(cheap & set(ends))]


def _bars(flow: Dataflow, node: fx.Node) -> bool:
    """Whether the node can be part of no segment: it cannot be run again, or not without changing the model."""
    if node.op == "output" or operations.is_ambient(node) or operations.own_generator(node):
        return True
    return _writes_to_model(flow, node) and not _stands_apart(node)


def _is_own(node: fx.Node) -> bool:
    """Whether the node is a parameter or buffer of the model, by name or as an input of a compiler's graph."""
    return node.op == "get_attr" or (node.op == "placeholder" and LIFTED in node.meta)


def _writes_to_model(flow: Dataflow, node: fx.Node) -> bool:
    targets = () if moves_statistics(node) else flow.written.get(node, ())
    return any(flow.memory[target].op in ("get_attr", "placeholder") for target in targets)


def _stands_apart(node: fx.Node) -> bool:
    """Whether the node (a count of batches) is in nobody's way: it reads and serves no other."""
    return not node.users and all(map(_is_own, node.all_input_nodes))


def _block(flow: Dataflow, nodes: Sequence[fx.Node], index: int) -> Block | None:
    """The segment of some nodes; what they read of the model's own is read inside.  None where nothing leaves it."""
    own = [node for node in nodes if node.op in _COMPUTED and not _writes_to_model(flow, node)]
    inside = set(own)
    sources = dict.fromkeys(source for node in own for source in node.all_input_nodes if source not in inside)
    read = [source for source in sources if source.op == "get_attr"]
    given = [source for source in sources if source.op != "get_attr"]
    handed = [node for node in own if any(user not in inside for user in node.users)]
    if not given or not handed:
        return None
    members = tuple(sorted((*own, *read), key=flow.position.__getitem__))
    first, *rest = handed
    name = f"segment {index} ({own[0].meta[SCOPE].path or own[0]} to {own[-1].meta[SCOPE].path or own[-1]})"
    return Block("segment", given[0], first, first, members, tuple(given[1:]), tuple(rest), name=name)


_COMPUTED = ("call_module", "call_function", "call_method")
