"""The allocator's peak of a training step, on the CPU and on CUDA.

On CUDA the caching allocator counts.  On the CPU torch's own allocator reports every allocation and free, with its
size, to the profiler (``profile_memory=True``); summed up in order, they give what is alive at each moment, to the
byte, and the same in every run:

1. only what is allocated within the step counts, and frees only of that: parameters, inputs and gradients that exist
   already are left out by themselves;
2. ``after_forward`` is what is alive where the loss has been computed, ``peak`` the most of the whole step.

Known limits: what kernels take past torch's allocator (oneDNN's scratchpads, buffers of BLAS) is not seen, and on CUDA
fragmentation is not.
Source: torch/csrc/profiler/collection.cpp, c10/core/CPUAllocator.cpp (``ProfiledCPUMemoryReporter``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_END_OF_FORWARD = "end of forward"


@dataclass(frozen=True)
class Bytes:
    """Bytes alive above the start of a step: ``after_forward``, at most (``peak``), and in the end (``left``)."""

    after_forward: int
    peak: int
    left: int


def step_bytes(forward: Callable[[], tuple[Any, torch.Tensor]], device: str | torch.device = "cpu") -> Bytes:
    """What ``forward()``, which gives an output and a loss of it, and the backward from that loss have alive."""
    if torch.device(device).type == "cuda":
        return _on_cuda(forward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        output, loss = forward()
        with torch.profiler.record_function(_END_OF_FORWARD):
            pass
        loss.backward()
        del output, loss
    return _along(profiler.profiler.kineto_results.events())


def _along(events: Any) -> Bytes:
    """Sums up the allocator's events in order."""
    middle = next(event.start_ns() for event in events if event.name() == _END_OF_FORWARD)
    now = peak = after_forward = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
        if event.start_ns() <= middle:
            after_forward = now
    return Bytes(after_forward, peak, now)


def _on_cuda(forward: Callable[[], tuple[Any, torch.Tensor]]) -> Bytes:
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output, loss = forward()
    after_forward = torch.cuda.memory_allocated() - start
    loss.backward()
    del output, loss
    torch.cuda.synchronize()
    return Bytes(after_forward, torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated() - start)
