"""Offload: what a segment is recomputed from waits for backward in the memory of the host.

1. torch's checkpoint saves the inputs of a segment under the hooks that are set around it: here ones that copy a value
   to the host as it is saved (to pinned memory, on a stream of its own), and back when backward asks for it.
2. When a segment's inputs are asked for, those of the offloaded segment before it, which is the next to be asked for,
   begin to come back too, so that they are there when its turn comes.
3. What the caller holds in any case (inputs of the model, parameters) stays where it is: copying it frees nothing.

Copies on the host stay as long as the graph of autograd, so that a backward may be repeated (``retain_graph``).
Source: torch.autograd.graph.save_on_cpu, which copies in turn with the computation; Rhu et al., "vDNN", MICRO 2016,
arXiv 1602.08124, section 3 (what is fetched ahead).
Known limits: an input of several offloaded segments is copied for each; tensor subclasses stay where they are.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfx.torch_versions import FakeTensor


class _Latest(threading.local):
    """What was offloaded last in this thread."""

    waiting: weakref.ref[Waiting] | None = None


_latest = _Latest()


def offloaded(inputs: Sequence[Any], first: bool) -> contextlib.AbstractContextManager[Any]:
    """A context in which autograd saves ``inputs`` on the host; ``first``: no segment of this run did so before."""
    moved = {_place(value) for value in inputs if isinstance(value, Tensor) and _is_moved(value)}
    if first:
        _latest.waiting = None

    def pack(tensor: Tensor) -> Waiting | Tensor:
        if _place(tensor) not in moved:
            return tensor
        waiting = Waiting(tensor)
        _latest.waiting = weakref.ref(waiting)
        return waiting

    def unpack(held: Waiting | Tensor) -> Tensor:
        return held.returned() if isinstance(held, Waiting) else held

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Waiting:
    """A value that waits on the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.before = _latest.waiting
        self.coming: Tensor | None = None
        self.stream = _stream_of(tensor)
        if self.stream is not None:
            self.stream.wait_stream(torch.get_device_module(self.device).current_stream(self.device))
            tensor.record_stream(self.stream)
        with _on(self.stream):
            self.host = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
            self.host.copy_(tensor.detach(), non_blocking=self.stream is not None)

    def begin(self) -> None:
        """Begin to come back to the device."""
        if self.coming is None:
            with _on(self.stream):
                self.coming = torch.empty_like(self.host, device=self.device)
                self.coming.copy_(self.host, non_blocking=self.stream is not None)

    def returned(self) -> Tensor:
        """The value on its device; what was offloaded before it begins to come back."""
        self.begin()
        if self.stream is not None:
            now = torch.get_device_module(self.device).current_stream(self.device)
            now.wait_stream(self.stream)
            self.coming.record_stream(now)  # type: ignore[union-attr]
        value, self.coming = self.coming, None
        before = self.before and self.before()
        if before is not None:
            before.begin()
        assert value is not None
        return value


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _is_moved(tensor: Tensor) -> bool:
    return tensor.grad_fn is not None and type(tensor) in (Tensor, FakeTensor)


def _on(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """What is done here is done on ``stream``, if there is one."""
    return contextlib.nullcontext() if stream is None else torch.get_device_module(stream.device).stream(stream)


_streams: dict[torch.device, Any] = {}


def _stream_of(tensor: Tensor) -> Any:
    """The stream for copies from and to a device; None where there is none to be had (the CPU, fake tensors)."""
    if tensor.device.type == "cpu" or isinstance(tensor, FakeTensor):
        return None
    module = torch.get_device_module(tensor.device)
    if not hasattr(module, "Stream"):
        return None
    if tensor.device not in _streams:
        _streams[tensor.device] = module.Stream(tensor.device)
    return _streams[tensor.device]
