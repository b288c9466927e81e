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
from mfx.integrations.annealing import Annealing


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

    class GammaCallback(Annealing, base):
        """Anneals gamma of a LightningModule, as :class:`mfx.GammaSchedule` does."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Begin, or go on where the Trainer's count is."""
            steps = self._steps or trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise OptionError("the training has no end that is known: give GammaCallback(..., steps=)")
            self.begin(pl_module, int(steps), trainer.global_step)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            """One step of the optimizer, if there was one: batches may be accumulated."""
            self.reach(trainer.global_step)

    GammaCallback.__qualname__ = "GammaCallback"
    return GammaCallback
