"""Random numbers from a seed, which a compiler can be given a second time."""

from mfx.run.seeded.counter import Seed, draw_seed
from mfx.run.seeded.random import counted

__all__ = ["Seed", "counted", "draw_seed"]
