"""For transformers' Trainer: a callback that anneals gamma, by the Trainer's own count of steps.

``GammaCallback(start=0.0, end=0.9, *, steps=None, shape="linear")`` moves gamma as :class:`mfx.GammaSchedule` does, one
step for each step of the optimizer; ``steps=None`` takes all steps of the training.  A training that is resumed goes on
where it was, and what the Trainer logs has gamma beside the loss.  The model may be wrapped (PEFT, accelerate, DDP).

Example:
    >>> from mfx.integrations.transformers import GammaCallback
    >>> callback = GammaCallback(0.0, 0.7, steps=100)
    >>> callback.gamma is None  # training has not begun
    True
"""

from __future__ import annotations

import functools
from typing import Any

from mfx.model import GammaSchedule


def __getattr__(name: str) -> Any:
    if name == "GammaCallback":
        return _gamma_callback()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@functools.cache
def _gamma_callback() -> type:
    from transformers import TrainerCallback

    class GammaCallback(TrainerCallback):
        """Anneals gamma of the model that a Trainer trains, as :class:`mfx.GammaSchedule` does."""

        def __init__(
            self, start: Any = 0.0, end: Any = 0.9, *, steps: int | None = None, shape: str = "linear"
        ) -> None:
            self._ends, self._steps, self._shape = (start, end), steps, shape
            self._schedule: GammaSchedule | None = None

        @property
        def gamma(self) -> Any:
            """Gamma now; None before training."""
            return None if self._schedule is None else self._schedule.gamma

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Begin, or go on where the Trainer's count is."""
            steps = self._steps or max(state.max_steps, 1)
            schedule = GammaSchedule(given["model"], *self._ends, steps=steps, shape=self._shape)
            schedule.load_state_dict({**schedule.state_dict(), "count": state.global_step})
            self._schedule = schedule

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """One step of the optimizer."""
            assert self._schedule is not None
            self._schedule.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            """Gamma beside the loss."""
            if logs is not None and isinstance(self.gamma, float):
                logs["gamma"] = self.gamma

    GammaCallback.__qualname__ = "GammaCallback"
    return GammaCallback
