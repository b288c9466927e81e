"""Live: the bytes that are alive along a run on fake tensors, and where the most of them are.

1. A dispatch mode sees what each operation gives; a storage that it has not seen before is born there.
2. A weak reference tells when the storage dies.
3. ``peak`` is the most bytes alive at once, ``where`` what ran then, ``course`` the bytes after each operation; what is
   set aside (gradients, as they are done) no longer counts there, but does in ``peak_with_aside``.

Storages from before the run (parameters, inputs, gradients that exist) are not counted.

Known limits: of what a kernel needs while it runs, only that of convolutions on the CPU is known
(:mod:`mfx.budget.workspaces`); tensors that are made without the dispatcher are not seen.
Source: torch/distributed/_tools/mem_tracker.py, which follows storages in the same way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mfx.budget.workspaces import workspace
from mfx.torch_versions import TorchDispatchMode, pytree


class LiveBytes(TorchDispatchMode):
    """Counts the bytes alive in its context.

    Args:
        where: tells what runs now; asked at each new peak, with the name of the operation.
        host: whether what lies in the memory of the host counts.

    Example:
        >>> import torch
        >>> with LiveBytes() as live:
        ...     x = torch.ones(256)
        ...     y = (x + 1) * 2
        >>> live.now, live.peak
        (2048, 3072)
    """

    def __init__(self, where: Callable[[], str] = str, host: bool = True) -> None:
        super().__init__()
        self.host = host
        self.now = 0
        self.aside = 0
        self.peak = 0
        self.peak_with_aside = 0
        self.where = ""
        self.course: list[int] = []
        self._ask = where
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._aside: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            seen = storage._cdata in before or storage._cdata in self._alive
            if not seen and (self.host or tensor.device.type != "cpu"):
                self._born(storage)
        self._mark(self.now + workspace(func, args, result), func)
        return result

    def set_aside(self, tensor: Tensor) -> None:
        """Count the memory of ``tensor`` apart from now on."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive and storage._cdata not in self._aside:
            self._aside.add(storage._cdata)
            self.now -= storage.nbytes()
            self.aside += storage.nbytes()

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def died(_: Any) -> None:
            del self._alive[key]
            if key in self._aside:
                self._aside.remove(key)
                self.aside -= size
            else:
                self.now -= size

        self._alive[key] = weakref.ref(storage, died)
        self.now += size

    def _mark(self, now: int, func: Any) -> None:
        self.course.append(now)
        self.peak_with_aside = max(self.peak_with_aside, now + self.aside)
        if now > self.peak:
            self.peak = now
            self.where = f"{func.__name__.partition('.')[0]} {self._ask()}".strip()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
