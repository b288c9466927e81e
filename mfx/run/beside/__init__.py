"""Values that leave a chain beside its state, and their whole gradient where somebody asks for it."""

from mfx.run.beside.joining import joined

__all__ = ["joined"]
