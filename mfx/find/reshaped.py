"""Reshaped: residual blocks that compute in another shape than the chain they stand in.

``r = P(x);  a = r + f(r);  y = Q(a)``, where P and Q only rearrange elements and Q undoes P, is ``y = x + Q(f(P(x)))``:
a block from x to y.  Transformers do so that flatten their tokens for the feed-forward part alone.

1. P are the rearranging operations before the add's skip, Q those after the add, one by one.
2. They are run on a tensor without data: where it comes out with x's shape and in its own order, Q undoes P.
3. The block is taken as a wrapped one, ``F(x) = y - x``, if another block ends in x or starts from y.  Of two blocks
   in a row that could both be taken so, through the same rearrangement, the first is: either way links them.

Known limits: shapes must be known; copies that a rearrangement needs (a reshape of a transposed tensor) are not seen
through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from mfx.find.block import Block, Rejection, collect
from mfx.find.check import check
from mfx.find.far import Far
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow, before_rearranging, rearranged
from mfx.graph.notes import SHAPE


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
    if not _undone(x, [*before, *after]):
        return None
    return x, (block.output, *after)


def _undone(x: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether the rearrangements ``nodes`` of ``x`` come to nothing."""
    shape = _sizes(x)
    if shape is None:
        return False
    value = torch.empty(shape, device="meta")
    for node in nodes:
        sizes = _sizes(node)
        if sizes is None:
            return False
        try:
            value = _permuted(value, node) if operations.is_permutation(node) else value.view(sizes)
        except (RuntimeError, IndexError, TypeError):
            return False
        if list(value.shape) != sizes:
            return False
    return list(value.shape) == shape and value.is_contiguous()


def _permuted(value: torch.Tensor, node: fx.Node) -> torch.Tensor:
    name = operations.name_of(node)
    return getattr(value, name)(*node.args[1:], **node.kwargs)


def _sizes(node: fx.Node) -> list[int] | None:
    """The shape, where all of it is known."""
    shape = node.meta.get(SHAPE)
    return None if shape is None or not all(isinstance(size, int) for size in shape) else list(shape)
