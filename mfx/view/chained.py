"""Chained: a row for each chain of a plan, what it costs in bytes and work, and whether something else would do better.

For each chain three ways are held against each other: reversing it, a checkpoint around each of its blocks, which keeps
each block's x, and nothing at all, which keeps what the original blocks keep.

- *Nothing* does better where the peak of the step stays where it is (:mod:`mfx.budget.advice`): nothing is recomputed.
- A *checkpoint* does better where it keeps fewer bytes, or as many and the chain would be inverted: a recomputation
  from x needs no inverse, and ends where the last activation is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from mfx.budget.advice import free_to_keep
from mfx.budget.prices import prices_of
from mfx.find import Block, Found
from mfx.graph.notes import DTYPE, ORIGINAL, SHAPE
from mfx.model.outlook import Outlook
from mfx.plan import Chain, Plan
from mfx.rule.linked import nominal
from mfx.run.conditions import autocast_dtype
from mfx.torch_versions import has_float64
from mfx.view.footprint import Peaks
from mfx.view.linking import LinkRow
from mfx.view.rows import ChainRow


def chain_rows(found: Found, plan: Plan, sizes: Mapping[fx.Node, int], peaks: Peaks | None) -> tuple[ChainRow, ...]:
    """A row for each chain; ``sizes`` are the bytes that each node keeps, where they are known."""
    rows = {chain.index: _row(chain, found, sizes) for chain in plan.chains}
    asked = {index: row for index, row in rows.items() if row.pays}
    if peaks is not None and asked:
        more = {index: (row.activation_bytes or 0) - (row.state_bytes or 0) for index, row in asked.items()}
        free = free_to_keep(found, plan, peaks.root, peaks.inputs, peaks.ours, more)
        prices = prices_of(found.flow.graph, peaks.root, peaks.inputs)
        for chain in plan.chains:
            work = sum(prices.work_of(block.members) for block in chain.blocks)
            rows[chain.index] = replace(rows[chain.index], work=work, free=chain.index in free)
    return tuple(rows.values())


def link_rows(outlooks: Sequence[Outlook], rows: Sequence[Sequence[ChainRow]]) -> tuple[LinkRow, ...]:
    """A row for the chains that each scope links; ``rows`` are those of each outlook's chains."""
    scopes = dict.fromkeys(outlook.scope for outlook in outlooks if outlook.scope is not None)
    return tuple(
        _link_row(scope, [(one, own) for one, own in zip(outlooks, rows, strict=True) if one.scope == scope])
        for scope in scopes
    )


def _link_row(scope: str, parts: list[tuple[Outlook, Sequence[ChainRow]]]) -> LinkRow:
    own = [(chain, row, part.count) for part, rows in parts for chain, row in zip(part.chains, rows, strict=True)]
    numbers = tuple(row.index for _, row, _ in own)
    gammas = tuple(gamma for _, row, count in own for gamma in row.gammas * max(count, 1))
    chain, row, _ = own[0]
    dtype, shape = chain.input.meta.get(DTYPE), chain.input.meta.get(SHAPE)
    if row.state_bytes is None or dtype is None or shape is None:
        return LinkRow(scope, numbers, None, "")
    device = next((parameter.device for parameter in parts[0][0].mm.parameters()), torch.device("cpu"))
    how = {"float64": has_float64(device), "rules": nominal(gammas)}
    pace = chain.schedule(dtype, autocast_dtype(device, dtype), **how)
    kept = pace.bytes_an_element(len(gammas)) * math.prod(shape)
    return LinkRow(scope, numbers, kept, pace.note(len(gammas)))


def activation_bytes(block: Block, sizes: Mapping[fx.Node, int]) -> int | None:
    """The bytes that a block keeps for backward in the original model."""
    nodes = {node.meta.get(ORIGINAL, node) for node in (*block.nodes, block.output)}
    return sum(sizes.get(node, 0) for node in nodes) if sizes else None


def _row(chain: Chain, found: Found, sizes: Mapping[fx.Node, int]) -> ChainRow:
    dtype: torch.dtype | None = chain.input.meta.get(DTYPE)
    rules = tuple(map(str, chain.rules))
    row = ChainRow(
        chain.number, chain.names, chain.gammas, rules, chain.rules[0].pull, chain.lag, stored=chain.way.text
    )
    if dtype is None or not sizes:
        return row
    row = replace(row, activation_bytes=sum(activation_bytes(block, sizes) or 0 for block in chain.blocks))
    if chain.plain or not chain.way.reversible:
        return row
    device = next((parameter.device for parameter in found.flow.root.parameters()), torch.device("cpu"))
    schedule = chain.schedule(dtype, autocast_dtype(device, dtype), float64=has_float64(device))
    steps, elements = len(chain.blocks), math.prod(chain.input.meta[SHAPE])
    return replace(
        row,
        state_dtype=str(schedule.state_dtype).removeprefix("torch."),
        snapshots=schedule.snapshots,
        state_bytes=schedule.bytes_an_element(chain.tail) * elements,
        checkpoint_bytes=steps * elements * dtype.itemsize,
        interval=schedule.interval(chain.tail),
        drift=schedule.drift,
        rounding=schedule.rounding,
        tolerance=schedule.tolerance,
    )
