"""Memory: how many bytes autograd keeps for backward, by prediction, and how many are alive, by the allocator.

1. *Kept* (:class:`KeptBytes`) are the distinct storages that are alive in saved tensors when the forward has ended, but
   for parameters, buffers and inputs, which are there anyway.  On fake tensors the same count is a prediction that
   needs no memory and no time.
2. *Allocated* (:func:`allocated_bytes`) is what the device's allocator has handed out and not got back.  Only this
   shows what is held by something else than a saved tensor, such as a reference cycle (M14): CUDA's caching allocator
   is asked by torch, the C library of the CPU by glibc's ``mallinfo2``.
3. :class:`StepBytes` holds what one training step has alive after its forward and leaves after its backward.

Known limits: what a backward keeps beside saved tensors (the generator's state for each block that draws: 5 KB
on the CPU, 16 bytes on CUDA) is not counted as kept.  On the CPU all threads of the process count, Python's small
objects do not (they come from arenas of Python's own), freed blocks below 1 KB may still count, and there is no peak;
other C libraries than glibc 2.33 or later, and allocators put in its place, cannot be asked: None.
Source: glibc's malloc/malloc.c (``mallinfo2``), torch/cuda/memory.py.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn


class _Held:
    """A saved tensor, as the autograd graph holds it."""

    def __init__(self, tensor: torch.Tensor, owner: object, order: int) -> None:
        self.tensor = tensor
        self.owner = owner
        self.order = order


class KeptBytes(AbstractContextManager["KeptBytes"]):
    """Counts what the operations in its context keep for backward.

    Set ``owner`` along the way to tell apart what belongs to what.

    Args:
        apart: tensors whose storages are not counted.

    Example:
        >>> import torch
        >>> x = torch.ones(256, requires_grad=True)
        >>> with KeptBytes([x]) as kept:
        ...     y = x.exp().sum()
        >>> kept.total()
        1024
    """

    def __init__(self, apart: Iterable[torch.Tensor] = ()) -> None:
        self.owner: object = None
        self._apart = {_storage(tensor) for tensor in apart}
        self._held: WeakSet[_Held] = WeakSet()
        self._aside: WeakSet[Any] = WeakSet()
        self._order = count()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        _counting.append(self._aside)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, value, trace)
        _counting.remove(self._aside)

    def _pack(self, tensor: torch.Tensor) -> _Held:
        # Without its history: a node that saves its own result would be held by what it holds, for ever.
        held = _Held(tensor.detach(), self.owner, next(self._order))
        self._held.add(held)
        return held

    def _beside(self) -> list[torch.Tensor]:
        return [tensor for holder in self._aside for tensor in holder.tensors]

    def by_owner(self) -> dict[object, int]:
        """Bytes kept, for each owner; a storage belongs to the one that saved it first."""
        sizes: dict[object, int] = {}
        seen = set(self._apart)
        aside = [_Held(tensor, None, -1) for tensor in self._beside()]
        for held in sorted([*self._held, *aside], key=lambda held: held.order):
            storage = _storage(held.tensor)
            if storage not in seen:
                seen.add(storage)
                size = values_of(held.tensor).untyped_storage().nbytes()
                sizes[held.owner] = sizes.get(held.owner, 0) + size
        return sizes

    def total(self, also: Iterable[torch.Tensor] = ()) -> int:
        """Bytes kept in all; with those of the tensors ``also`` that are not among them."""
        seen = self._apart | {_storage(held.tensor) for held in self._held} | {*map(_storage, self._beside())}
        others = {_storage(tensor): values_of(tensor).untyped_storage().nbytes() for tensor in also}
        return sum(self.by_owner().values()) + sum(size for storage, size in others.items() if storage not in seen)


_counting: list[WeakSet[Any]] = []


def kept_aside(holder: Any) -> None:
    """Count what ``holder.tensors`` are then, wherever kept bytes are counted: no saved tensors, but kept as such."""
    for aside in _counting:
        aside.add(holder)


def kept_bytes(model: nn.Module, inputs: Iterable[torch.Tensor], forward: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that ``forward()`` through ``model`` keeps for backward, and its result."""
    with KeptBytes([*model.parameters(), *model.buffers(), *inputs]) as kept:
        output = forward()
    return kept.total(), output


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a training step has alive ``after_forward``, and leaves ``after_backward``, above its start."""

    after_forward: int
    after_backward: int


def step_bytes(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device | str = "cpu"
) -> StepBytes | None:
    """What one training step holds, by the allocator of ``device``; None where that cannot be asked.

    The first steps of a model also make what stays (gradients, captured graphs, workspaces of kernels).

    Example:
        >>> import torch
        >>> x = torch.ones(1 << 18, requires_grad=True)
        >>> found = step_bytes(lambda: x.exp().sum(), lambda y: torch.autograd.grad(y, x))
        >>> found is None or found.after_forward // (1 << 20), found is None or found.after_backward // (1 << 20)
        (1, 0)
    """
    with settled():
        start = allocated_bytes(device)
        output = forward()
        middle = allocated_bytes(device)
        backward(output)
        del output
        end = allocated_bytes(device)
    if start is None or middle is None or end is None:
        return None
    return StepBytes(middle - start, end - start)


@contextmanager
def settled() -> Iterator[None]:
    """Collect garbage, and leave what is there out of further collections."""
    gc.collect()
    with only_new_garbage():
        yield


class _Frozen:
    """Who has what is there left out of collections."""

    by_us = False
    by_others = False


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Let :func:`gc.collect` look at what is made meanwhile only: of all objects of a process it takes long."""
    # To count them takes long too, where there are many: once is enough.  Theirs must not end here.
    _Frozen.by_others = _Frozen.by_others or (not _Frozen.by_us and gc.get_freeze_count() > 0)
    if _Frozen.by_us or _Frozen.by_others:
        yield
        return
    _Frozen.by_us = True
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _Frozen.by_us = False


def allocated_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes that the allocator of ``device`` has handed out and not got back, after a collection of garbage.

    None where the allocator cannot be asked.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cpu":
        ask = _heap()
        return None if ask is None else ask()
    ask = getattr(torch.get_device_module(device), "memory_allocated", None) if device.type != "meta" else None
    return None if ask is None else int(ask(device))


def peak_bytes(run: Callable[[], Any], device: torch.device | str) -> int | None:
    """The most bytes alive at once while ``run()`` runs, above its start; None where there is no such count (the CPU).

    The device's peak is reset for it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - start


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2``: ``uordblks`` are bytes handed out of the heaps, ``hblkhd`` those mapped one by one."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@functools.cache
def _heap() -> Callable[[], int] | None:
    """Asks glibc for the bytes it has handed out; None where it cannot tell, or tensors come from elsewhere."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo2.restype = _Mallinfo2

    def ask() -> int:
        found = mallinfo2()
        return int(found.uordblks + found.hblkhd)

    start = ask()
    tensor = torch.empty(1 << 24, dtype=torch.uint8)
    seen = ask() - start
    # Another allocator in malloc's place (jemalloc, tcmalloc) leaves glibc's figures where they were.
    return ask if seen >= tensor.nbytes else None


def _storage(tensor: torch.Tensor) -> int:
    return values_of(tensor).untyped_storage()._cdata


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the one that all values of a jagged tensor lie in."""
    return tensor.values() if tensor.is_nested and tensor.layout == torch.jagged else tensor


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of that, without asking autograd; nor may a tensor of a transform be touched where it does not run."""
    return values_of(tensor.detach()).shape if tensor.is_nested else tensor.shape


def format_bytes(size: int) -> str:
    """A size in the unit that suits it.

    >>> format_bytes(3 * 1024 * 1024)
    '3.0 MiB'
    """
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
