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

from mfx.integrations.annealing import Annealing


def __getattr__(name: str) -> Any:
    if name == "GammaCallback":
        return _gamma_callback()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@functools.cache
def _gamma_callback() -> type:
    from transformers import TrainerCallback

    class GammaCallback(Annealing, TrainerCallback):
        """Anneals gamma of the model that a Trainer trains, as :class:`mfx.GammaSchedule` does."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """Begin, or go on where the Trainer's count is."""
            self.begin(given["model"], self._steps or max(state.max_steps, 1), state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            """One step of the optimizer."""
            self.reach(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            """Gamma beside the loss."""
            if logs is not None and isinstance(self.gamma, float):
                logs["gamma"] = self.gamma

    GammaCallback.__qualname__ = "GammaCallback"
    return GammaCallback
