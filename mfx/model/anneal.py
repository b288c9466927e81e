"""Anneal: change gamma from one value to another while training.

A pretrained residual network is the momentum network of gamma = 0.  To make it one of a larger gamma without losing
what it learned, gamma is moved a little with every training step:

1. ``step()`` counts, and computes gamma from the count alone: linearly, or along half a cosine, which starts and
   ends slowly;
2. :func:`mfx.set_gamma` puts it in place; the plan (snapshots, state) follows from the next forward on, and a
   backward that is still to come uses the gamma its forward ran with.

Reference: the shapes are those of ``torch.optim.lr_scheduler.LinearLR`` and ``CosineAnnealingLR``; starting from
gamma = 0 is section 4 of Sander et al., ICML 2021, arXiv 2102.07870 ("fine-tuning").
Known limits: with activation_budget=, a compiled model is compiled anew for each gamma.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from mfx.errors import OptionError
from mfx.model.parts import parts_of, set_gamma
from mfx.options import check_gamma

_SHAPES = {"linear": lambda share: share, "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2}


class GammaSchedule:
    """Moves gamma of a momentumized model from ``start`` to ``end`` in ``steps`` calls of :meth:`step`.

    After t calls::

        gamma(t) = start + (end - start) * s(min(t / steps, 1))
        s(u) = u                      for "linear"
        s(u) = (1 - cos(pi u)) / 2    for "cosine"

    Args:
        mm: a momentumized model; its gamma becomes ``start``.
        start, end: floats in [0, 1), or mappings from block-name pattern to float with the same patterns.
        steps: how many calls lead from ``start`` to ``end``; later calls leave gamma at ``end``.
        shape: ``"linear"`` or ``"cosine"``.

    Raises:
        OptionError: a gamma outside [0, 1), ``steps`` below 1, an unknown shape, patterns that differ.
        InputTypeError: ``mm`` is not momentumized.

    Example:
        >>> import torch, torchvision, mfx
        >>> mm = mfx.momentumize(torchvision.models.resnet18(weights=None), gamma=0.0)
        >>> schedule = mfx.GammaSchedule(mm, 0.0, 0.9, steps=3)
        >>> [round(schedule.step(), 2) for _ in range(4)]
        [0.3, 0.6, 0.9, 0.9]
    """

    def __init__(self, mm: nn.Module, start: Any = 0.0, end: Any = 0.9, *, steps: int, shape: str = "linear") -> None:
        if shape not in _SHAPES:
            raise OptionError(f"shape must be one of {', '.join(map(repr, _SHAPES))}, not {shape!r}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"steps must be a whole number of at least 1, not {steps!r}")
        self._first, self._last = _pairs(start), _pairs(end)
        if [pattern for pattern, _ in self._first] != [pattern for pattern, _ in self._last]:
            raise OptionError(f"start and end must name the same patterns: {start!r} and {end!r} do not")
        parts_of(mm)
        self.mm = mm
        self.steps = steps
        self.shape = shape
        self.count = 0
        set_gamma(mm, self._value())

    @property
    def gamma(self) -> float | dict[str, float]:
        """The gamma now in force."""
        return self._value()

    def step(self) -> Any:
        """Count one training step, set the new gamma, and return it."""
        self.count += 1
        if self.count <= self.steps:
            set_gamma(self.mm, self._value())
        return self._value()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: plain values only."""
        return {
            "count": self.count,
            "steps": self.steps,
            "shape": self.shape,
            "start": list(self._first),
            "end": list(self._last),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; sets gamma.

        Raises:
            OptionError: ``state`` is not from a GammaSchedule.
        """
        missing = {"count", "steps", "shape", "start", "end"} - set(state)
        if missing:
            raise OptionError(f"not the state of a GammaSchedule: {', '.join(sorted(missing))} missing")
        self.count, self.steps, self.shape = state["count"], state["steps"], state["shape"]
        self._first = tuple((pattern, value) for pattern, value in state["start"])
        self._last = tuple((pattern, value) for pattern, value in state["end"])
        set_gamma(self.mm, self._value())

    def _value(self) -> Any:
        share = _SHAPES[self.shape](min(self.count / self.steps, 1.0))
        ends = zip(self._first, self._last, strict=True)
        values = {pattern: first + (last - first) * share for (pattern, first), (_, last) in ends}
        return values.get("", values)


def _pairs(gamma: Any) -> tuple[tuple[str, float], ...]:
    """(pattern, gamma) pairs; one gamma for all has no pattern."""
    checked = check_gamma(gamma)
    if callable(checked):
        raise OptionError(f"gamma={gamma!r} is no float or mapping, and only these can be moved from one to another")
    return checked if isinstance(checked, tuple) else (("", checked),)
