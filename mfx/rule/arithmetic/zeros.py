"""Zeros: elements of a state that are exactly 0, so that floating arithmetic gives them back as 0.

Undoing a step leaves rounding noise where x was 0, and where everything hangs on a tie that is no longer a small error:
a channel that dropout set to 0, normalized, is 0 everywhere and ReLU passes no gradient; 1e-8 of noise, normalized, is
noise of a size that counts, and ReLU passes half of it (a first bias gradient off by 0.4 at gamma 0.9, 0.7 at 0.5).

An element that is 0 at the start of a run stays so until a branch moves it, and does not come back but by accident.  So
one byte an element tells them all: for how many steps it was 0.  On the CPU it is kept only if there are such elements.

Known limits: zeros that come about later, and ties of other values than 0, are not seen; exact arithmetic
(:mod:`mfx.rule.arithmetic.carry`) keeps all of them.  More than 255 steps are not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 255


def counted_zeros(counts: Tensor | None, x: Tensor, steps: int, known: bool) -> Tensor | None:
    """For each element, the number of states that it was 0 in, from the first one of a segment on.

    Args:
        counts: those of the states before; None before the first state, and where nothing is to be counted any more.
        x: the state, the one after ``steps`` others.
        known: whether a look at the values costs nothing, so that counts without any zero need not be kept.
    """
    if steps >= _MOST or (counts is None and steps > 0):
        return counts
    zero = x.detach() == 0
    if counts is None:
        return None if known and not zero.any() else zero.to(torch.uint8)
    still = zero & (counts == steps)
    return counts if known and not still.any() else counts + still


def with_zeros(x: Tensor, counts: Tensor | None, steps: int) -> Tensor:
    """x after ``steps`` others with the elements that were 0 as 0."""
    return x if counts is None else torch.where(counts > steps, torch.zeros((), dtype=x.dtype, device=x.device), x)
