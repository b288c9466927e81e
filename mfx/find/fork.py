"""Fork: where two values part, and whether one of them is computed by parameters from there.

A projection shortcut and its branch part at x, and have layers behind it.  The sums that rotary embeddings, modulation
(``x * (1 + scale) + shift``) and mixing by weights are made of have none: they are no residual adds at all.

Known limits: two layers of one condition, ``g(c) * x + h(c)``, look like a projection and its branch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch import fx

from mfx.find.check import from_parameter
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.graph.sums import is_scaling

MOST = 512
"""The most values that are looked at; beyond, two values count as computed."""


def parts_compute(flow: Dataflow, left: fx.Node, right: fx.Node) -> bool:
    """Whether parameters do more than to scale on the way from where two values part to one of them."""
    sides = {left: 1, right: 2} if left is not right else {left: 3}
    ahead = [(-flow.position[node], node.name, node) for node in sides]
    heapq.heapify(ahead)
    seen: list[fx.Node] = []
    while ahead:
        _, _, node = heapq.heappop(ahead)
        if sides[node] == 3:
            return any_computes(flow, _after(node, seen))
        seen.append(node)
        if len(seen) > MOST:
            return True
        for source in () if operations.is_query(node) else node.all_input_nodes:
            if flow.origins[source]:
                if source not in sides:
                    heapq.heappush(ahead, (-flow.position[source], source.name, source))
                sides[source] = sides.get(source, 0) | sides[node]
    return True


def any_computes(flow: Dataflow, nodes: Iterable[fx.Node]) -> bool:
    """Whether the parameters of some nodes do more than to scale."""
    return any(
        flow.has_parameters(node)
        or (not is_scaling(node) and any(from_parameter(flow, source) for source in node.all_input_nodes))
        for node in nodes
        if flow.origins[node]
    )


def _after(fork: fx.Node, seen: Iterable[fx.Node]) -> list[fx.Node]:
    """Those of the values, from the last to the first, that are computed from ``fork``."""
    found: dict[fx.Node, None] = {fork: None}
    for node in reversed([*seen]):
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return [node for node in found if node is not fork]
