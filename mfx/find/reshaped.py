"""Reshaped: residual blocks that compute in another shape than the chain they stand in.

``r = P(x);  a = r + f(r);  y = Q(a)``, where P and Q only rearrange elements and Q undoes P, is ``y = x + Q(f(P(x)))``:
a block from x to y.  Transformers do so that flatten their tokens for the feed-forward part alone.

1. P are the rearranging operations before the add's skip, Q those after the add, one by one.
2. Whether Q undoes P: :mod:`mfx.graph.rearranging`.
3. The block is taken as a wrapped one, ``F(x) = y - x``, if another block ends in x or starts from y.  Of two blocks
   in a row that could both be taken so, through the same rearrangement, the first is: either way links them.

Known limits: shapes must be known; copies that a rearrangement needs (a reshape of a transposed tensor) are not seen
through.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mfx.find.block import Block, Rejection, collect
from mfx.find.check import check
from mfx.find.far import Far
from mfx.graph.dataflow import Dataflow
from mfx.graph.rearranging import before_rearranging, is_undone, rearranged


def take_in(flow: Dataflow, matches: Sequence[Block | Rejection | Far]) -> list[Block | Rejection | Far]:
    """``matches`` with the blocks that a detour parts from their neighbours as blocks from x to y."""
    blocks = [match for match in matches if isinstance(match, Block)]
    found = {block: around for block in blocks if (around := _around(flow, block)) is not None}
    starts = {match.skip for match in matches if not isinstance(match, Rejection)} | {x for x, _ in found.values()}
    ends = {block.output for block in blocks} | {tail[-1] for _, tail in found.values()}
    taken: list[Block | Rejection | Far] = []
    inside: set[fx.Node] = set()
    for match in matches:
        if isinstance(match, Block) and match in found:
            x, tail = found[match]
            if x in ends or tail[-1] in starts:
                block = check(flow, collect(flow, "wrapped", x, tail[-1], tail[-1], tail, 1.0, match.written))
                if isinstance(block, Block) and inside.isdisjoint(block.members):
                    inside.update(block.members)
                    match = block
        taken.append(match)
    return taken


def _around(flow: Dataflow, block: Block) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """x, and the nodes from the add to y."""
    if block.kind != "residual":
        return None
    before = before_rearranging(block.skip)
    after = rearranged(block.output)
    if not before or not after:
        return None
    x = flow.source(before[0].all_input_nodes[0])
    if not is_undone(x, [*before, *after]):
        return None
    return x, (block.output, *after)
