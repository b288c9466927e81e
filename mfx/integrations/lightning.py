"""For Lightning's Trainer: a callback that anneals gamma, by the Trainer's own count of steps.

``GammaCallback(start=0.0, end=0.9, *, steps=None, shape="linear")`` moves gamma of all momentumized parts of the
LightningModule as :class:`mfx.GammaSchedule` does, one step for each step of the optimizer; ``steps=None`` takes all
steps of the training.  A training that goes on from a checkpoint goes on where gamma was.

Example::

    from mfx.integrations.lightning import GammaCallback

    lightning.Trainer(callbacks=[GammaCallback(0.0, 0.7, steps=1000)]).fit(module, data)
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from mfx.errors import OptionError
from mfx.model import GammaSchedule


def __getattr__(name: str) -> Any:
    if name == "GammaCallback":
        return _gamma_callback()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@functools.cache
def _gamma_callback() -> type:
    try:
        library = importlib.import_module("lightning.pytorch")
    except ImportError:
        library = importlib.import_module("pytorch_lightning")
    base: Any = library.Callback

    class GammaCallback(base):
        """Anneals gamma of a LightningModule, as :class:`mfx.GammaSchedule` does."""

        def __init__(
            self, start: Any = 0.0, end: Any = 0.9, *, steps: int | None = None, shape: str = "linear"
        ) -> None:
            self._ends, self._steps, self._shape = (start, end), steps, shape
            self._schedule: GammaSchedule | None = None

        @property
        def gamma(self) -> Any:
            """Gamma now; None before training."""
            return None if self._schedule is None else self._schedule.gamma

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Begin, or go on where the Trainer's count is."""
            steps = self._steps or trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise OptionError("the training has no end that is known: give GammaCallback(..., steps=)")
            schedule = GammaSchedule(pl_module, *self._ends, steps=int(steps), shape=self._shape)
            schedule.load_state_dict({**schedule.state_dict(), "count": trainer.global_step})
            self._schedule = schedule

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            """One step of the optimizer, if there was one: batches may be accumulated."""
            assert self._schedule is not None
            while self._schedule.count < trainer.global_step:
                self._schedule.step()

    GammaCallback.__qualname__ = "GammaCallback"
    return GammaCallback
