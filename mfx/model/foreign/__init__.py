"""What other tools put around a model's modules: hooks, and the code of torch.distributed."""

from mfx.model.foreign.around import captured_around, general_around
from mfx.model.foreign.hooks import Hooked

__all__ = ["Hooked", "captured_around", "general_around"]
