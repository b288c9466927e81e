"""Running statistics: those that a segment moves, computed in it and added up outside.

1. A segment makes a running statistic ``r`` to ``c r + d``, where ``c`` is known and ``d`` does not depend on ``r``.
2. The segment is given 0 for ``r`` (:func:`zeros_for`), so that it makes ``d``, which is a result of its own
   (:func:`from_zero`).
3. Where the segment stands, ``r`` becomes ``c r + d`` (:func:`added_up`).  So the second run does not need ``r``, which
   a later forward has changed by then (M5, M7).

Known limits: where c is not known (a momentum that is a tensor), two forwards before a backward are an error of
autograd ("modified by an inplace operation"), as with torch's own checkpoint under a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mfx.rule import StepSpec


def from_zero(spec: StepSpec) -> StepSpec:
    """``spec`` with what it adds to each running statistic as a further result."""
    moved = _moved(spec)
    if not moved:
        return spec
    again = _from_zero(spec.again, moved)
    return replace(spec, branch=_from_zero(spec.branch, moved), again=again)


def zeros_for(spec: StepSpec, inputs: Sequence[Any]) -> list[Any]:
    """The ``inputs`` of ``spec``, as :func:`from_zero` takes them."""
    given = list(inputs)
    for place in _moved(spec):
        like = given[place]
        # One number, and no zeros_like(), which a compiler takes for a use of the values.
        given[place] = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
    return given


def added_up(spec: StepSpec, inputs: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
    """The results of ``spec``, of those of :func:`from_zero`; running statistics among its ``inputs`` move."""
    moved = _moved(spec)
    count = len(results) - len(moved)
    with torch.no_grad():
        for (place, factor), added in zip(moved.items(), results[count:], strict=True):
            inputs[place].mul_(factor).add_(added)
    return tuple(results[:count])


def _moved(spec: StepSpec) -> dict[int, float]:
    return {1 + side: factor for side, factor in spec.statistics.items() if factor is not None}


def _from_zero(branch: Callable[..., Any], moved: dict[int, float]) -> Callable[..., Any]:
    def apart(root: nn.Module, *inputs: Any) -> tuple[Any, ...]:
        given = list(inputs)
        for place in moved:
            given[place] = inputs[place].clone(memory_format=torch.contiguous_format)
        return (*branch(root, *given), *(given[place] for place in moved))

    return apart
