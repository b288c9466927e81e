"""Level: of blocks inside one another, those in the longer chain; the outer ones on a tie.

Blocks are taken by the length of their chains, the longest first.  An add with a far skip (:mod:`mfx.find.far`) around
a block that has been taken is nested in that; any other is collected now.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from mfx.errors import Reason
from mfx.find import Block, Far, Rejection
from mfx.graph.dataflow import Dataflow


def one_level(flow: Dataflow, blocks: Sequence[Block], far: Sequence[Far], rejections: list[Rejection]) -> list[Block]:
    """Of overlapping blocks, those in the longer chain; the outer ones on a tie."""

    def place(block: Block) -> int:
        return flow.position[block.add]

    ends = _ends_of_chains(blocks, far)
    linked = _collected(flow, (row for row in far if row not in ends), rejections)
    blocks = sorted((*blocks, *linked), key=place)
    lengths = _chain_lengths(blocks, ends)
    owner: dict[fx.Node, Block] = {}
    kept = []
    for _, alike in itertools.groupby(sorted(lengths, key=lengths.__getitem__, reverse=True), lengths.__getitem__):
        rows = list(alike)
        level = [row for row in rows if isinstance(row, Block)]
        around = [row for row in rows if isinstance(row, Far) and not _is_nested(flow, row, owner, rejections)]
        level += _collected(flow, around, rejections)
        for block in sorted(level, key=lambda block: (-len(block.nodes), place(block))):
            other = next((owner[node] for node in block.nodes if node in owner), None)
            if other is not None:
                rejections.append(reject(block, Reason.NESTED, other.name))
                continue
            kept.append(block)
            owner.update(dict.fromkeys(block.nodes, block))
    return sorted(kept, key=place)


def _ends_of_chains(blocks: Sequence[Block], far: Sequence[Far]) -> set[Far]:
    """Those of ``far`` whose blocks, whatever they are, make the chain of no other block longer."""
    rows = (*blocks, *far)
    starts, outputs, near = {row.skip for row in rows}, {row.output for row in rows}, {block.skip for block in blocks}
    return {row for row in far if row.output not in starts and (row.skip not in outputs or row.skip in near)}


def _collected(flow: Dataflow, far: Iterable[Far], rejections: list[Rejection]) -> list[Block]:
    """The blocks of some adds with far skips; what is none is rejected."""
    found = [row.collected(flow) for row in far]
    rejections += [row for row in found if isinstance(row, Rejection)]
    return [row for row in found if isinstance(row, Block)]


def _is_nested(flow: Dataflow, far: Far, owner: Mapping[fx.Node, Block], rejections: list[Rejection]) -> bool:
    """Whether ``far`` is seen to be around a block that has been taken; it is rejected then."""
    witness = far.witness(flow, owner)
    if witness is not None:
        rejections.append(Rejection(far.output, Reason.NESTED, owner[witness].name, far.name))
    return witness is not None


def _chain_lengths(blocks: Sequence[Block], ends: Iterable[Far]) -> dict[Block | Far, int]:
    """For each block, the length of the longest run of linked blocks through it; ``ends`` end theirs."""
    forward: dict[Block, int] = {}
    starts: dict[fx.Node, list[Block]] = {}
    before: dict[fx.Node, int] = {}
    for block in blocks:
        starts.setdefault(block.skip, []).append(block)
    for block in reversed(blocks):
        forward[block] = 1 + max((forward[after] for after in starts.get(block.output, ())), default=0)
    lengths: dict[Block | Far, int] = {}
    for block in blocks:
        backward = 1 + before.get(block.skip, 0)
        before[block.output] = max(before.get(block.output, 0), backward)
        lengths[block] = forward[block] + backward - 1
    return lengths | {far: 1 + before.get(far.skip, 0) for far in ends}


def reject(block: Block | Far, reason: Reason, node: object = None) -> Rejection:
    """The block as one that is kept."""
    return Rejection(block.output, reason, node, block.name)
