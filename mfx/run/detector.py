"""Drift: how far a chain's reconstructed state is from what is known of it, measured in every backward.

What a backward reconstructs can be held against what is known, at no cost but a few element-wise operations:

1. at the chain's start v_0 is known (zero, or the velocity given): one step from (x_0, v_0), with the branch value
   that the backward computes anyway, must give the v_1 that was reconstructed.  No division is needed, so gamma = 0
   is checked as well;
2. at each snapshot the same holds for the state after it, x and v; at gamma = 0, and outside of chains, where nothing
   is reconstructed, the norm of the last value that is computed again (:mod:`mfx.run.uninverted.dropped`);
3. where the last step is computed from a snapshot, the norm of x_N is kept from the forward and compared.

``drift`` is the largest of ``|v_1 - v_1'| / max(|v_1|, |v|)``, v the velocity where the run began to be reversed,
and ``|x_1 - x_1'| / |x_1|``, in the L2 norm.  Where it passes the chain's tolerance a :class:`mfx.DriftWarning` says
so.  It is 0 in exact arithmetic (:mod:`mfx.rule.arithmetic.carry`) if every branch repeated itself bit for bit.

The value stays on its device.  On the CPU it is looked at when the backward ends; elsewhere it is copied without
waiting and looked at in a later forward of the chain, once it has arrived, or when :func:`mfx.drift` asks for it.

Reference: design by analogy with checkpoint's determinism check (torch/utils/checkpoint.py), which compares
shapes and dtypes only.
Known limits: a chain whose first blocks need no gradient is not reversed to its start, and is checked at snapshots
only.  At a snapshot that keeps x alone, with gamma > 0, nothing is known of v.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mfx.errors import DriftWarning
from mfx.memory import values_of


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
        f"{chain}: what backward reconstructed or recomputed is off by {value:.1e} relative to what is known of it "
        f"(tolerance {tolerance:.0e}), and so may the gradients be. Either a branch did not compute in backward what "
        "it computed in forward (a non-deterministic kernel: torch.use_deterministic_algorithms(True); random "
        "numbers from a generator of its own; state outside of buffers; weights changed through .data), or its "
        "branches amplify errors more than planned for: give a smaller tolerance=, state_dtype=torch.float64, a "
        "gamma nearer to 1, or exclude= the block. mfx.verify compares with stored activations"
    )


_PIECES = 16
_WHOLE = 1 << 12
"""Into how many pieces tensors are cut, and from how many elements on."""
_SAMPLE = 1 << 16
"""How many elements, about, tell whether a function repeats itself."""


def size_of(value: Tensor) -> Tensor:
    """The L2 norm."""
    return torch.linalg.vector_norm(values_of(value.detach()))


def size_of_sample(value: Tensor, turn: int) -> Tensor:
    """The L2 norm of some of the elements, from all over; at each ``turn`` of others, so that none is never seen."""
    value = values_of(value.detach())
    if type(value) is not Tensor or value.numel() <= _SAMPLE:
        return size_of(value)
    # Rows are read at once, so what is left out is not read.
    dim = max(range(max(value.dim() - 1, 1)), key=value.size)
    every = min(value.numel() // _SAMPLE, value.size(dim))
    return size_of(value[(slice(None),) * dim + (slice(turn % every, None, every),)])


def pieces(*tensors: Tensor | None, whole: bool = False) -> Iterator[tuple[Any, ...]]:
    """The same slices of tensors of one shape (None stays None), so that computing with them takes little memory; one
    if ``whole``."""
    found = [None if one is None else values_of(one.detach()) for one in tensors]
    like = next(one for one in found if one is not None)
    if whole or like.numel() < _WHOLE:
        yield tuple(found)
        return
    longest = max(range(like.dim()), key=like.size)
    cut = [None if one is None else one.chunk(_PIECES, longest) for one in found]
    for number in range(len(like.chunk(_PIECES, longest))):
        yield tuple(None if parts is None else parts[number] for parts in cut)


class Distance:
    """How far values are from others, by pieces: of each kind the sums of squares of ``a - b`` and of ``a``."""

    def __init__(self) -> None:
        self.sums: dict[int, list[Tensor]] = {}

    def add(self, kind: int, a: Tensor, b: Tensor | None = None) -> None:
        """Take a piece of ``a``, and of the ``b`` that it is held against."""
        found = [_squares(a.detach() - b) if b is not None else None, _squares(a)]
        sums = self.sums.setdefault(kind, [torch.zeros_like(found[1]), torch.zeros_like(found[1])])
        for place, square in enumerate(found):
            if square is not None:
                sums[place] = sums[place] + square

    def relative(self, scale: Tensor | None, size: Tensor | None) -> Tensor:
        """The largest of ``|a - b| / |a|``, for kind 1 of ``max(|a|, scale)``; ``|(|a| - size)| / |a|`` without b."""
        found = []
        for kind, (apart, own) in self.sums.items():
            length = own.sqrt()
            off = apart.sqrt() if size is None else (length - size.double()).abs()
            if kind == 1 and scale is not None:
                length = torch.maximum(length, scale.double())
            found.append(off / length.clamp_min(torch.finfo(torch.float32).tiny))
        return torch.stack(found).amax()


def _squares(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.detach()).double().square()
