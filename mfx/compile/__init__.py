"""The pass under ``torch.compile``: as a backend, and on momentumized models inside of what is compiled."""

from mfx.compile.as_backend import Backend, backend

__all__ = ["Backend", "backend"]
