"""Hooks of modules that a capture entered: they do not run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from mfx.errors import CaptureError, HookWarning
from mfx.sharding import is_distributed


class Hooked:
    """Says so, once for each module of a model of this class, whose momentum side is at ``prefix``."""

    def __init__(self, original: type[nn.Module], prefix: str) -> None:
        self.original, self.prefix = original, prefix
        self.said: set[str] = set()

    def tell(self, root: nn.Module, hooked: Iterable[str], stacklevel: int) -> None:
        """Warn of the entered modules of ``root`` at the paths ``hooked``, which have hooks.

        Raises:
            CaptureError: without its hooks one of them would not compute what it is to compute.
        """
        for path in hooked:
            if is_distributed(root.get_submodule(path)):
                raise self._refusal(self._full(path))
        paths = [self._full(path) for path in hooked if self._full(path) not in self.said]
        if paths:
            self.said.update(paths)
            warnings.warn(
                f"forward or backward hooks on {', '.join(paths)} will not run: their modules are part of the "
                f"captured graph of {self.original.__name__}. Hooks on the model itself and on modules taken whole "
                "do run",
                HookWarning,
                stacklevel=stacklevel + 1,
            )

    def _full(self, path: str) -> str:
        return ".".join(filter(None, (self.prefix, path)))

    def _refusal(self, path: str) -> CaptureError:
        return CaptureError(
            f"{path!r} is sharded (fully_shard, parallelize_module), whose hooks run on its own call, but it is part "
            f"of the captured graph of {self.original.__name__}, since chains run in it and outside of it as well. "
            f"Shard its blocks or {self.original.__name__} instead, or name it a block: modules={path!r}"
        )
