"""Largest: the largest size that fits a memory, asked as few times as can be.

1. From a size that is known to be possible, sizes grow until one does not fit, or fall until one does.
2. What a step needs is nearly a straight line in the size, so the next size asked is where the line through the two
   nearest answers meets the memory; after :data:`_BY_LINE` answers it is the middle of what is left.
3. It ends where a size fits and the next one does not: both have been asked.

Known limits: sizes that are refused are taken to lie below all that are possible, or above them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_BY_LINE = 8
_GROWTH = 64


@dataclass(frozen=True)
class Largest:
    """The largest ``size`` that fits (0 where none does), and what each size that was asked needs (None: refused)."""

    size: int
    needs: Mapping[int, float | None]


def largest(needs: Callable[[int], float | None], memory: float, start: int) -> Largest:
    """The largest size whose ``needs`` are at most ``memory``.

    Args:
        needs: bytes for a size; infinite where no bytes would do, None where the size is impossible.
        memory: bytes.
        start: a size that is possible.

    Example:
        >>> found = largest(lambda size: 100 + 7 * size, 1000, start=4)
        >>> found.size, sorted(found.needs)
        (128, [4, 8, 128, 129])
    """
    known: dict[int, float | None] = {}
    fits, low, high = 0, 0, math.inf
    size = start
    while high - low > 1:
        found = known[size] = needs(size)
        if size > start if found is None else found > memory:
            high = size
        else:
            low = size
            fits = size if found is not None else fits
        size = _next(known, memory, low, high)
    return Largest(fits, known)


def _next(known: Mapping[int, float | None], memory: float, low: int, high: float) -> int:
    """The size to ask next, between ``low`` and ``high``."""
    points = sorted(
        ((size, found) for size, found in known.items() if found is not None and math.isfinite(found)),
        key=lambda point: abs(point[1] - memory),
    )[:2]
    if high == math.inf:
        first, last = low + 1, _GROWTH * low
        middle = 2 * low
    else:
        first, last = low + 1, int(high) - 1
        middle = 1 if not low and len(known) == 1 else (first + last) // 2
    if len(points) == 2 and len(known) <= _BY_LINE:
        (one, at_one), (other, at_other) = points
        slope = (at_other - at_one) / (other - one)
        middle = math.floor(one + (memory - at_one) / slope) if slope > 0 else middle
    return max(first, min(last, middle))
