"""Stored: the plain run of a chain, or of its tail, in which autograd stores what it needs.

1. The steps before the tail carry their state as the reversible run does, so that both compute the same.
2. Of the tail nothing is ever undone: it goes on in floating arithmetic, in the model's own dtype, but for the half
   precisions, in which the sum of many small velocities would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfx.rule.arithmetic.carry import Floating
from mfx.rule.arithmetic.snapshots import Schedule
from mfx.run.chain import ChainSpec, Continue, Inner, continued

State = tuple[Tensor, "Tensor | None"]


def stored(
    chain: ChainSpec,
    carry: Floating,
    root: nn.Module,
    x: Tensor,
    v: Tensor | None,
    operands: Sequence[Sequence[Any]],
    dtype: torch.dtype,
) -> tuple[list[Any], Tensor, Tensor | None]:
    """What a chain hands out, and the state as carried."""
    inner = Inner(chain)
    x, v, dtype = _stepped(inner, range(chain.tail), carry, root, (x, v), operands, dtype)
    if chain.tail < len(chain.steps):
        x, v = _tail(inner, root, _as_in_tail(chain, carry, (x, v), dtype), operands, dtype)
    return inner.handed_out(), x, v


def stored_tail(
    inner: Inner,
    carry: Floating,
    root: nn.Module,
    edges: State,
    state: State,
    operands: Sequence[Sequence[Any]],
    dtype: torch.dtype,
) -> None:
    """Run the tail from a ``state`` that others carried, for which autograd has ``edges``."""
    x, v = _as_in_tail(inner.chain, carry, state, dtype)
    x = continued(edges[0], x)
    _tail(inner, root, (x, None if v is None else Continue.apply(edges[1], v)), operands, dtype)  # type: ignore[arg-type]


def _tail(inner: Inner, root: nn.Module, state: State, operands: Sequence[Sequence[Any]], dtype: torch.dtype) -> State:
    steps = inner.chain.steps
    carry = Floating(steps, Schedule(state[0].dtype, ()))
    return _stepped(inner, range(inner.chain.tail, len(steps)), carry, root, state, operands, dtype)[:2]


def _as_in_tail(chain: ChainSpec, carry: Floating, state: State, dtype: torch.dtype) -> State:
    """The carried state as the tail goes on with it; steps that are the model's own have it as it is (M1)."""
    x, v = state
    plain = all(step.rule.plain for step in chain.steps[chain.tail :])
    own = x.dtype if plain else torch.promote_types(dtype, torch.float32)
    return x.to(own), None if v is None else carry.velocity(chain.tail, v).to(own)


def _stepped(
    inner: Inner,
    indices: range,
    carry: Floating,
    root: nn.Module,
    state: State,
    operands: Sequence[Sequence[Any]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """The state after some steps, as carried, and the dtype that the model has x in."""
    chain, (x, v) = inner.chain, state
    for index in indices:
        step = chain.steps[index]
        x, v = carry.enter(index, x, v)
        value, *extra = step.branch(root, x.to(dtype), *inner.sides(index, operands[index]))
        dtype = step.result_dtype(dtype, value.dtype)
        x, v = carry.advance(index, x, v, value)
        out = x.to(dtype)
        inner.record(out, extra)
        x = continued(out, x) if index in chain.taps else x
        if index + 1 in chain.ends:
            inner.read_out(out, carry.velocity(index + 1, v))
    return x, v, dtype
