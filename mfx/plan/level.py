"""Level: of blocks inside one another, those in the longer chain; the outer ones on a tie."""

from __future__ import annotations

from torch import fx

from mfx.errors import Reason
from mfx.find import Block, Rejection


def one_level(blocks: list[Block], rejections: list[Rejection]) -> list[Block]:
    """Of overlapping blocks, those in the longer chain; the outer ones on a tie."""
    lengths = _chain_lengths(blocks)
    order = {block: index for index, block in enumerate(blocks)}
    ranked = sorted(blocks, key=lambda block: (-lengths[block], -len(block.nodes), order[block]))
    owner: dict[fx.Node, Block] = {}
    kept = []
    for block in ranked:
        other = next((owner[node] for node in block.nodes if node in owner), None)
        if other is not None:
            rejections.append(reject(block, Reason.NESTED, other.name))
            continue
        kept.append(block)
        owner.update(dict.fromkeys(block.nodes, block))
    return sorted(kept, key=order.__getitem__)


def _chain_lengths(blocks: list[Block]) -> dict[Block, int]:
    """For each block, the length of the longest run of linked blocks through it."""
    forward: dict[Block, int] = {}
    starts: dict[fx.Node, list[Block]] = {}
    ends: dict[fx.Node, int] = {}
    for block in blocks:
        starts.setdefault(block.skip, []).append(block)
    for block in reversed(blocks):
        forward[block] = 1 + max((forward[after] for after in starts.get(block.output, ())), default=0)
    lengths = {}
    for block in blocks:
        backward = 1 + ends.get(block.skip, 0)
        ends[block.output] = max(ends.get(block.output, 0), backward)
        lengths[block] = forward[block] + backward - 1
    return lengths


def reject(block: Block, reason: Reason, node: object = None) -> Rejection:
    """The block as one that is kept."""
    return Rejection(block.output, reason, node, block.name)
