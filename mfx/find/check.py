"""Check: whether a block can be recomputed, and the reason where it cannot.

The table of reasons, in order; the first that names a node counts.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from mfx.errors import Reason
from mfx.find.block import Block, Rejection
from mfx.graph import operations
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import LIFTED, SHAPE
from mfx.graph.resources import moves_statistics


def check(flow: Dataflow, block: Block, named: bool = False) -> Block | Rejection:
    """The block, or the reason why it cannot be rewritten; one that the caller ``named`` needs no parameters."""
    for reason, node in (
        (Reason.NO_PARAMETERS, None if named else _without_parameters(flow, block)),
        (Reason.BROADCAST, _broadcast(block)),
        (Reason.OWN_GENERATOR, next(filter(operations.own_generator, block.members), None)),
        *_write_faults(flow, block),
    ):
        if node is not None:
            return Rejection(block.output, reason, node)
    return block


def _without_parameters(flow: Dataflow, block: Block) -> fx.Node | None:
    sides = [node for node in block.sides if not flow.origins[node]]
    if any(flow.has_parameters(node) for node in block.members):
        return None
    return None if any(from_parameter(flow, side) for side in sides) else block.value


def from_parameter(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a value depends on no input, and is computed from a parameter."""
    if flow.origins[node]:
        return False
    pending, seen = [node], set[fx.Node]()
    while pending:
        here = pending.pop()
        if here not in seen:
            if flow.has_parameters(here):
                return True
            seen.add(here)
            pending += here.all_input_nodes
    return False


def _broadcast(block: Block) -> fx.Node | None:
    x, value = block.skip.meta.get(SHAPE), block.value.meta.get(SHAPE)
    return block.value if x is not None and value is not None and not _may_be_same(x, value) else None


def _may_be_same(shape: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """A size that depends on values is a text: the step compares it when it runs (:class:`mfx.ShapeError`)."""
    pairs = zip(shape, other, strict=False)
    return len(shape) == len(other) and all(a == b or isinstance(a, str) or isinstance(b, str) for a, b in pairs)


def _write_faults(flow: Dataflow, block: Block) -> list[tuple[Reason, fx.Node | None]]:
    """What the block's in-place writes, and writes during it, would break."""
    x = flow.memory[block.skip]
    members = set(block.members)
    add = block.add
    faults: list[tuple[Reason, fx.Node | None]] = []
    for node in block.members:
        if node is add and block.written:
            continue
        for owner in {flow.memory[target] for target in flow.written.get(node, ())}:
            if block.written and node in block.tail and owner is flow.memory[add]:
                continue  # the branch adds into a tensor of its own, and what follows writes to that
            if owner is x:
                faults.append((Reason.WRITES_SKIP, node))
            elif owner not in members and not _may_write(flow, node, owner):
                faults.append((Reason.WRITES_OUTSIDE, node))
            elif any(flow.memory[escape] is owner for escape in block.escapes):
                faults.append((Reason.READS_OVERWRITTEN, node))
    if block.written:
        owner = flow.memory[add]
        if owner.op in ("placeholder", "get_attr"):
            faults.append((Reason.WRITES_INPUT, add))
        faults.append((Reason.READS_OVERWRITTEN, flow.stale_reads.get(add)))
    return faults


def _may_write(flow: Dataflow, node: fx.Node, owner: fx.Node) -> bool:
    """Whether a recomputation knows how to undo, or leave out, the node's write to ``owner``: it is a buffer."""
    if owner.op == "get_attr":
        return not flow.has_parameters(owner)
    return owner.meta.get(LIFTED) == "buffer" and moves_statistics(node)
