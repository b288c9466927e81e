"""What needs no inverse: chains at gamma = 0, steps that keep their activations, and segments that are recomputed."""

from mfx.run.uninverted.kept import kept_step
from mfx.run.uninverted.segment import recomputed

__all__ = ["kept_step", "recomputed"]
