"""From a chain and tensors to tensors, forward and backward; knows no ``torch.fx``."""

from mfx.run.chain import ChainSpec
from mfx.run.reversible import run
from mfx.run.uninverted.segment import recomputed

__all__ = ["ChainSpec", "recomputed", "run"]
