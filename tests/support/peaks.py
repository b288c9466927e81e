"""The most bytes that are alive at once, by the allocator: on the CPU it keeps no such count, but the profiler is told
of every allocation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated_peak(run: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at once while ``run()`` runs, above its start; no garbage is collected in it."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
    finally:
        gc.enable()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    alive = most = 0
    for _, size in sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda e: e[0]):
        alive += size
        most = max(most, alive)
    return most
