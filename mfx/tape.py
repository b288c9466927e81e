"""Tape: what one forward of one chain leaves for its backward, and the state while that runs.

1. Forward, a step that is planned to leaves its state here, as a snapshot (:mod:`mfx.precision`).
2. Backward, each step takes the state after it off the tape, and leaves the state before it.
3. Where the state is known, what was reconstructed is held against it (:mod:`mfx.drift`).
4. A compiler that sees forward and backward compute the same from one snapshot would do so once, and keep all of it in
   between.  So it is given the snapshot as a *twin*, with some bits turned, which backward turns back.

How the state is computed, and undone, is up to :mod:`mfx.carry`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from mfx.carry import carry
from mfx.counter import Seed
from mfx.drift import relative
from mfx.errors import BackwardError
from mfx.momentum import ChainSpec
from mfx.precision import Schedule
from mfx.random import counted
from mfx.recompute import Autocast, is_recording

Observer = Callable[[str, int, Tensor, "Tensor | None"], None]


def compiling(x: Tensor) -> bool:
    """Whether the code that runs will be fused, forward and backward each in its own way."""
    return torch.compiler.is_compiling() or isinstance(x, FunctionalTensor)


_observers: list[tuple[Observer, Callable[[str, Schedule], None]]] = []


@contextlib.contextmanager
def observing(observer: Observer, begin: Callable[[str, Schedule], None] = lambda chain, plan: None) -> Iterator[None]:
    """Tell ``observer(chain, i, x_i, v_i)`` each state of the reversible chains that start in this context.

    Forward ``begin(chain, plan)`` is told, then the states 0 to N; backward the states N - 1 to 0 as they are
    reconstructed.
    """
    _observers.append((observer, begin))
    try:
        yield
    finally:
        _observers.remove((observer, begin))


class Tape:
    """What one forward of one chain leaves for its backward, and the state while it runs."""

    def __init__(
        self, chain: ChainSpec, plan: Schedule, root: nn.Module, autocast: Autocast, dtype: torch.dtype
    ) -> None:
        self.chain = chain
        self.plan = plan
        self.root = root
        self.autocast = autocast
        self.dtypes = [dtype]
        self.strides: list[tuple[int, ...]] = []
        self.first: int | None = None
        self.snapshots: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.carry = carry(chain.steps, plan)
        self.start: Tensor | None = None
        self.state: tuple[Tensor, Tensor | None] | None = None
        self.end: Tensor | None = None
        self.size: Tensor | None = None
        self.drifts: list[Tensor] = []
        self.position = -1
        self.observer = _observers[-1][0] if _observers else None
        if _observers:
            _observers[-1][1](chain.name, plan)
        self.seed: Seed | None = None
        self.twin: Tensor | None = None
        self.symbolic = False

    def draws(self, index: int, again: bool) -> contextlib.AbstractContextManager[None]:
        """Around a branch, in both of its runs: what a compiler traces takes its random values from the seed."""
        step = self.chain.steps[index]
        if not self.symbolic or not (self.seed is not None or is_recording()):
            return contextlib.nullcontext()
        seed = self.seed if self.twin is None or not again else Seed.of_twin(self.twin)
        return counted(seed if step.draws else None, index, step.name)

    @cached_property
    def inverts_last(self) -> bool:
        """Whether the backward of the last step needs the end state."""
        return len(self.chain.steps) - 1 not in self.plan.snapshots

    def observe(self, index: int, x: Tensor, v: Tensor | None = None) -> None:
        """Tell the observer, if any, about a state."""
        if self.observer is not None:
            self.observer(self.chain.name, index, x, None if v is None else self.carry.velocity(index, v))

    def before(self, index: int) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor | None] | None]:
        """x_i, v_i where it is kept, and the state after the step, all as carried."""
        if self.position != index + 1:
            raise BackwardError(
                f"{self.chain.name}: block {self.chain.steps[index].name!r} ran out of turn in backward; "
                "a backward through a chain has to start at the chain's outputs"
            )
        self.position = index
        after, self.state = self.state, None
        if index in self.snapshots:
            x, v = self.snapshots.pop(index)
            return x, v, after
        assert after is not None
        x, v = after
        assert v is not None
        x = _with_strides(self.carry.x_before(index, x, v), self.strides[index])
        return x.to(self.dtype_of_state(index)), None, after

    def leave(self, index: int, x: Tensor, v: Tensor | None) -> None:
        """Put the state before a step on the tape; after the last one give the drift away."""
        if index != self.first:
            self.state = (x, v)
        elif self.drifts:
            drifts, self.drifts = self.drifts, []
            self.chain.drift.record(torch.stack(drifts).amax(), self.chain.name, self.plan.tolerance)

    def check(
        self, index: int, x: Tensor, v: Tensor | None, after: tuple[Tensor, Tensor | None] | None, value: Tensor
    ) -> None:
        """Hold one step from a known state against the state after it that was reconstructed (or kept)."""
        known = index == 0 or v is not None or self.chain.steps[index].gamma == 0
        if not known or compiling(x) or isinstance(x, FakeTensor):
            return
        expected_x, expected_v = self.carry.advance(index, x, self.start if index == 0 else v, value.detach())
        if after is None:
            if self.size is not None:
                self.drifts.append(relative([(size_of(expected_x), self.size, None)]))
            return
        x_after, v_after = after
        pairs: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if index in self.plan.snapshots:
            pairs.append((expected_x, x_after, None))
        if v_after is not None:
            v_after = self.carry.velocity(index + 1, v_after)
            pairs.append((self.carry.velocity(index + 1, expected_v), v_after, self.end))
        self.drifts.append(relative(pairs))

    def dtype_of_state(self, index: int) -> torch.dtype:
        """The dtype in which x_i was carried."""
        return torch.promote_types(self.plan.state_dtype, self.dtypes[index])


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    # Along a stride of 0 (expand) all values are one; it is written once.
    single = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    return torch.empty_strided(single.shape, strides, dtype=x.dtype, device=x.device).copy_(single).expand(x.shape)


def size_of(value: Tensor) -> Tensor:
    """The L2 norm."""
    return torch.linalg.vector_norm(value.detach())


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def twin_of(value: Tensor) -> Tensor:
    """The bits of ``value``, one of them turned, as whole numbers."""
    return value.view(_BITS[value.element_size()]) ^ 1


def of_twin(twin: Tensor, dtype: torch.dtype) -> Tensor:
    """The value of a twin."""
    return (twin ^ 1).view(dtype)
