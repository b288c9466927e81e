"""Drift: how far a chain's reconstructed state is from what is known of it, measured in every backward.

What a backward reconstructs can be held against what is known, at no cost but a few element-wise operations:

1. at the chain's start v_0 is known (zero, or the velocity given): one step from (x_0, v_0), with the branch value
   that the backward computes anyway, must give the v_1 that was reconstructed.  No division is needed, so gamma = 0
   is checked as well;
2. at each snapshot the same holds for the state after it, x and v;
3. where the last step is computed from a snapshot, the norm of x_N is kept from the forward and compared.

``drift`` is the largest of ``|v_1 - v_1'| / max(|v_1|, |v|)``, v the velocity where the run began to be reversed,
and ``|x_1 - x_1'| / |x_1|``, in the L2 norm.  Where it passes the chain's tolerance a :class:`mfx.DriftWarning` says
so.  It is 0 in exact arithmetic (:mod:`mfx.rule.carry`) if every branch repeated itself bit for bit.

The value stays on its device.  On the CPU it is looked at when the backward ends; elsewhere it is copied without
waiting and looked at in a later forward of the chain, once it has arrived, or when :func:`mfx.drift` asks for it.

Reference: design by analogy with checkpoint's determinism check (torch/utils/checkpoint.py), which compares
shapes and dtypes only.
Known limits: a chain whose first blocks need no gradient is not reversed to its start, and is checked at snapshots
only.  At a snapshot that keeps x alone, with gamma > 0, nothing is known of v.  Not measured in compiled code.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from mfx.errors import DriftWarning


class Drift:
    """The drift of one chain: values on their way, and the last one that arrived of each segment."""

    def __init__(self) -> None:
        self._values: dict[int, float] = {}
        self._pending: list[tuple[Tensor, Any, str, float, int]] = []

    @property
    def value(self) -> float | None:
        """The largest of the segments' last values; None before there is one."""
        return max(self._values.values(), default=None)

    def record(self, value: Tensor, chain: str, tolerance: float, segment: int = 0) -> None:
        """Take the value of one backward through a segment, a tensor without dimensions."""
        event = None
        if value.device.type != "cpu":
            event = torch.get_device_module(value.device).Event()
            value = value.to("cpu", non_blocking=True)
            event.record()
        self._pending.append((value, event, chain, tolerance, segment))
        self.poll()

    def poll(self, wait: bool = False) -> None:
        """Look at the values that have arrived (at all, if ``wait``), and warn of those over the tolerance."""
        while self._pending:
            value, event, chain, tolerance, segment = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            del self._pending[0]
            found = self._values[segment] = float(value)
            if found > tolerance:
                warnings.warn(_text(chain, found, tolerance), DriftWarning, stacklevel=3)


def _text(chain: str, value: float, tolerance: float) -> str:
    return (
        f"{chain}: the state reconstructed in backward is off by {value:.1e} relative to what is known of it "
        f"(tolerance {tolerance:.0e}), and so may the gradients be. Either a branch did not compute in backward what "
        "it computed in forward (a non-deterministic kernel: torch.use_deterministic_algorithms(True); random "
        "numbers from a generator of its own; state outside of buffers; weights changed through .data), or its "
        "branches amplify errors more than planned for: give a smaller tolerance=, state_dtype=torch.float64, a "
        "gamma nearer to 1, or exclude= the block. mfx.verify compares with stored activations"
    )


def size_of(value: Tensor) -> Tensor:
    """The L2 norm."""
    return torch.linalg.vector_norm(value.detach())


def relative(pairs: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
    """The largest of ``|a - b| / max(|a|, |scale|)`` over the triples (a, b, scale)."""
    return torch.stack([_relative(a.detach(), b, scale).double() for a, b, scale in pairs]).amax()


def _relative(a: Tensor, b: Tensor, scale: Tensor | None) -> Tensor:
    size = torch.linalg.vector_norm(a)
    if scale is not None:
        size = torch.maximum(size, scale.to(size.dtype))
    return torch.linalg.vector_norm(a - b) / size.clamp_min(torch.finfo(size.dtype).tiny)
