"""Annealing: what the callbacks of all trainers have in common; how often they step is the trainer's own count."""

from __future__ import annotations

from typing import Any

from torch import nn

from mfx.model import GammaSchedule


class Annealing:
    """Moves gamma of a model as :class:`mfx.GammaSchedule` does, once a training has begun."""

    def __init__(self, start: Any = 0.0, end: Any = 0.9, *, steps: int | None = None, shape: str = "linear") -> None:
        self._ends, self._steps, self._shape = (start, end), steps, shape
        self._schedule: GammaSchedule | None = None

    @property
    def gamma(self) -> Any:
        """Gamma now; None before training."""
        return None if self._schedule is None else self._schedule.gamma

    def begin(self, model: nn.Module, steps: int, count: int) -> None:
        """Begin a training of so many ``steps``, or go on where it has taken ``count`` of them."""
        schedule = GammaSchedule(model, *self._ends, steps=steps, shape=self._shape)
        schedule.load_state_dict({**schedule.state_dict(), "count": count})
        self._schedule = schedule

    def reach(self, count: int) -> None:
        """Go on to where the training has taken ``count`` steps."""
        assert self._schedule is not None
        while self._schedule.count < count:
            self._schedule.step()
