"""Level: of blocks inside one another, those in the longer chain; the outer ones on a tie.

1. A chain is counted on one level: what goes on with a block is the outermost one that starts there, not what is inside
   of that.  So of groups of blocks with long skips all are taken whole, or all inside.
2. The blocks of the longest chains are taken.  Those inside of them or around them are nested, and are in no chain any
   more when the next ones are taken.
3. An add with a far skip (:mod:`mfx.find.far`) around a block that has been taken is nested in that; any other is
   collected when it is its turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from mfx.errors import Reason
from mfx.find import Block, Far, Rejection
from mfx.graph.dataflow import Dataflow


def one_level(flow: Dataflow, blocks: Sequence[Block], far: Sequence[Far], rejections: list[Rejection]) -> list[Block]:
    """Of overlapping blocks, those in the longer chain; the outer ones on a tie."""

    def place(row: Block | Far) -> int:
        return flow.position[row.add]

    ends = _ends_of_chains(blocks, far)
    linked = _collected(flow, (row for row in far if row not in ends), rejections)
    open_rows: list[Block | Far] = [*sorted((*blocks, *linked), key=place), *sorted(ends, key=place)]
    outermost: dict[fx.Node, Block | Far] = {}
    for row in sorted(open_rows, key=lambda row: flow.position[row.output]):
        outermost[row.skip] = row
    owner: dict[fx.Node, Block] = {}
    kept: list[Block] = []
    while open_rows:
        lengths = _chain_lengths(outermost, sorted((*kept, *_blocks(open_rows)), key=place), _far(open_rows))
        longest = max(map(lengths.__getitem__, open_rows))
        rows = [row for row in open_rows if lengths[row] == longest]
        open_rows = [row for row in open_rows if lengths[row] != longest]
        around = [row for row in _far(rows) if not _is_nested(flow, row, owner, rejections)]
        level = [*_blocks(rows), *_collected(flow, around, rejections)]
        for block in sorted(level, key=lambda block: (-len(block.nodes), place(block))):
            other = next((owner[node] for node in block.nodes if node in owner), None)
            if other is not None:
                rejections.append(reject(block, Reason.NESTED, other.name))
                continue
            kept.append(block)
            owner.update(dict.fromkeys(block.nodes, block))
        nested = {block: owner[node] for block in _blocks(open_rows) for node in block.nodes if node in owner}
        rejections += [reject(block, Reason.NESTED, other.name) for block, other in nested.items()]
        open_rows = [row for row in open_rows if row not in nested]
    return sorted(kept, key=place)


def _blocks(rows: Iterable[Block | Far]) -> list[Block]:
    return [row for row in rows if isinstance(row, Block)]


def _far(rows: Iterable[Block | Far]) -> list[Far]:
    return [row for row in rows if isinstance(row, Far)]


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


def _chain_lengths(
    outermost: Mapping[fx.Node, Block | Far], blocks: Sequence[Block], ends: Iterable[Far]
) -> dict[Block | Far, int]:
    """For each block, the length of the longest run of linked blocks through it; ``ends`` end theirs.

    Of blocks with one skip, which are inside one another, the ``outermost`` alone goes on with what is before.
    """
    forward: dict[Block | Far, int] = dict.fromkeys(ends, 1)
    for block in reversed(blocks):
        forward[block] = 1 + forward.get(outermost.get(block.output, block), 0)
    before: dict[fx.Node, int] = {}
    lengths: dict[Block | Far, int] = {}
    for row in (*blocks, *ends):
        backward = 1 + (before.get(row.skip, 0) if outermost.get(row.skip) is row else 0)
        before[row.output] = max(before.get(row.output, 0), backward)
        lengths[row] = forward[row] + backward - 1
    return lengths


def reject(block: Block | Far, reason: Reason, node: object = None) -> Rejection:
    """The block as one that is kept."""
    return Rejection(block.output, reason, node, block.name)
