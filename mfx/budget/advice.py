"""Advice: where keeping activations costs nothing, since the most is alive at another time.

1. From the last chain to the first, each keeps its activations beside those that do already, and stays so if the peak
   of the rewritten graph (:mod:`mfx.budget.step`) is no higher then.
2. What a chain keeps is alive when the forward has ended, so where there is no room for it by then, nothing is tried.

Known limits: after :data:`_MOST` trials the chains before are taken to be better reversed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mfx.budget.choose import keeping
from mfx.budget.step import Peak, peak_of
from mfx.find import Found
from mfx.plan import Plan
from mfx.rewrite import ByRoot, rewrite

_MOST = 12


def free_to_keep(
    found: Found, plan: Plan, root: nn.Module, inputs: Sequence[Any], peak: Peak, added: Mapping[int, int]
) -> frozenset[int]:
    """The chains, by index, that can all keep their activations without a higher ``peak``.

    ``added`` are the bytes that this adds to what is alive after the forward, for each chain that can be asked about.
    """
    position = found.flow.position
    asked = [chain for chain in plan.momentum if chain.index in added and chain.way.reversible]
    room, trials, free = peak.bytes - peak.after_forward, 0, frozenset[int]()
    for chain in sorted(asked, key=lambda chain: position[chain.output], reverse=True):
        if added[chain.index] > room or trials == _MOST:
            continue
        trials += 1
        kept = [block for other in plan.chains if other.index in free | {chain.index} for block in other.blocks]
        graph = rewrite(found, keeping(plan, kept), ByRoot()).graph
        if peak_of(graph, root, inputs, rewritten=True).bytes <= peak.bytes:
            free |= {chain.index}
            room -= added[chain.index]
    return free
