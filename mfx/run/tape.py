"""Tape: what one forward of a chain leaves for its backward, and what that backward goes by.

1. :class:`Setting` is what all steps of one forward share, known before the first.
2. :class:`Recorder` collects, while forward runs, one :class:`Trace` a step; :class:`Left` is made of it when the
   segment ends (:mod:`mfx.run.reversible`), and nobody writes to it.
3. :class:`Rewind` is made of :class:`Left` and the saved tensors when a backward begins: it holds the state, which each
   step takes as it is after it and leaves as it was before (:mod:`mfx.rule.carry` computes it).  Where the state is
   known, what was reconstructed is held against it (:mod:`mfx.run.detector`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError
from mfx.rule.carry import Floating
from mfx.rule.snapshots import Schedule
from mfx.rule.zeros import counted_zeros, with_zeros
from mfx.run.chain import ChainSpec
from mfx.run.conditions import Autocast, compiling
from mfx.run.detector import relative, size_of
from mfx.run.seeded import Seed, counted
from mfx.torch_versions import FakeTensor, is_recording

Observer = Callable[[str, int, Tensor, "Tensor | None"], None]
State = tuple[Tensor, "Tensor | None"]

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


@dataclass(frozen=True, eq=False)
class Setting:
    """What all steps of one forward have in common; ``seed`` and its ``twin`` are for what a compiler traces."""

    chain: ChainSpec
    plan: Schedule
    root: nn.Module
    autocast: Autocast
    carry: Floating
    symbolic: bool
    seed: Seed | None = None
    twin: Tensor | None = None
    observer: Observer | None = None

    def draws(self, index: int, again: bool) -> contextlib.AbstractContextManager[None]:
        """Around a branch, in both of its runs: what a compiler traces takes its random values from the seed."""
        step = self.chain.steps[index]
        if not self.symbolic or not (self.seed is not None or is_recording()):
            return contextlib.nullcontext()
        seed = self.seed if self.twin is None or not again else Seed.of_twin(self.twin)
        return counted(seed if step.draws else None, index, step.name)

    def observe(self, index: int, x: Tensor, v: Tensor | None = None) -> None:
        """Tell the observer, if any, about a state."""
        if self.observer is not None:
            self.observer(self.chain.name, index, x, None if v is None else self.carry.velocity(index, v))


def newest_observer(chain: str, plan: Schedule) -> Observer | None:
    """The observer that is to be told of a chain that starts, and now knows of it."""
    if not _observers:
        return None
    observer, begin = _observers[-1]
    begin(chain, plan)
    return observer


@dataclass(frozen=True)
class Trace:
    """What one step leaves: the dtype and strides of its x, and whether a gradient will come by."""

    dtype: torch.dtype
    strides: tuple[int, ...]
    differentiable: bool


class Recorder:
    """Collects what forward leaves, step by step, from the step ``first`` on.

    ``escapes`` is how many values the last step's branch hands out; ``zeros`` are the counts of
    :mod:`mfx.rule.zeros`.
    """

    def __init__(self, dtype: torch.dtype, first: int) -> None:
        self.dtype = dtype
        self.first = first
        self.traces: list[Trace] = []
        self.snapshots: dict[int, State] = {}
        self.escapes = 0
        self.zeros: Tensor | None = None

    def note_zeros(self, setting: Setting, x: Tensor) -> None:
        """Count the zeros of a state, if states are reconstructed in floating arithmetic (M2)."""
        if not (setting.plan.exact or setting.symbolic or len(setting.plan.snapshots) == len(setting.chain.steps)):
            self.zeros = counted_zeros(self.zeros, x, len(self.traces), x.device.type == "cpu")

    def record(self, strides: tuple[int, ...], differentiable: bool, result: torch.dtype) -> None:
        """Note one step, and the dtype of its result."""
        self.traces.append(Trace(self.dtype, strides, differentiable))
        self.dtype = result

    @property
    def end(self) -> int:
        """The step that comes next."""
        return self.first + len(self.traces)


@dataclass(frozen=True, eq=False)
class Left:
    """What the forward of the steps ``begin`` to ``end`` leaves beside saved tensors.

    ``first`` is the first of them that a gradient comes by; ``layout`` tells the saved snapshots: the step, and whether
    v is there beside x; ``starts`` whether v_0 is saved, ``counts`` whether counts of zeros are; ``size`` is
    the norm of the last x where no end state is kept.
    """

    setting: Setting
    traces: tuple[Trace, ...]
    begin: int
    first: int | None
    layout: tuple[tuple[int, bool], ...]
    starts: bool
    size: Tensor | None
    counts: bool

    @staticmethod
    def of(setting: Setting, recorder: Recorder, starts: bool, size: Tensor | None) -> Left:
        """What is left when the segment has ended."""
        begin, traces = recorder.first, tuple(recorder.traces)
        first = next((index for index, trace in enumerate(traces, begin) if trace.differentiable), None)
        layout = tuple((index, v is not None) for index, (_, v) in recorder.snapshots.items())
        return Left(setting, traces, begin, first, layout, starts, size, recorder.zeros is not None)

    @property
    def inverts_last(self) -> bool:
        """Whether the backward of the last step needs the end state."""
        return self.begin + len(self.traces) - 1 not in self.setting.plan.snapshots

    def strides(self, index: int) -> tuple[int, ...]:
        """The strides of x_index."""
        return self.traces[index - self.begin].strides

    def state_dtype(self, index: int) -> torch.dtype:
        """The dtype in which x_index was carried."""
        return torch.promote_types(self.setting.plan.state_dtype, self.traces[index - self.begin].dtype)


class Slot:
    """Where the steps of a segment find the :class:`Rewind` of the backward that runs.

    ``beside`` has, for each step, weak references to the values from inside its branch that were handed out.
    """

    rewind: Rewind | None = None

    def __init__(self) -> None:
        self.beside: dict[int, list[Callable[[], Any]]] = {}

    def note(self, index: int, values: Iterable[Any]) -> None:
        """Remember values from inside the branch of a step."""
        self.beside.setdefault(index, []).extend(weakref.ref(value) for value in values if isinstance(value, Tensor))

    def held(self) -> list[Tensor]:
        """Those that somebody still holds."""
        values = (reference() for references in self.beside.values() for reference in references)
        return [value for value in values if value is not None]


class Rewind:
    """The state of a segment while a backward runs: ``state`` is the one after the step whose turn is next.

    Args:
        left: what forward left.
        end: (x, v) after the last step as carried, if kept.
        start: v_0, if there is one.
        snapshots: the states kept before steps.
        zeros: for how many states each element was 0.
    """

    def __init__(
        self,
        left: Left,
        end: State | None,
        start: Tensor | None,
        snapshots: dict[int, State],
        zeros: Tensor | None = None,
    ) -> None:
        self.left = left
        self.zeros = zeros
        self.start = start
        self.snapshots = snapshots
        self.state = end
        self.position = left.begin + len(left.traces)
        carry = left.setting.carry
        self.scale = None if end is None or end[1] is None else size_of(carry.velocity(self.position, end[1]))
        self.drifts: list[Tensor] = []

    def before(self, index: int) -> tuple[Tensor, Tensor | None, State | None]:
        """x_i, v_i where it is kept, and the state after the step, all as carried."""
        setting = self.left.setting
        if self.position != index + 1:
            raise out_of_turn(setting.chain, index)
        self.position = index
        after, self.state = self.state, None
        if index in self.snapshots:
            x, v = self.snapshots.pop(index)
            return x, v, after
        assert after is not None
        x, v = after
        assert v is not None
        x = with_zeros(setting.carry.x_before(index, x, v), self.zeros, index - self.left.begin)
        x = _with_strides(x, self.left.strides(index))
        return x.to(self.left.state_dtype(index)), None, after

    def leave(self, index: int, x: Tensor, v: Tensor | None) -> bool:
        """Take the state before a step; after the last one give the drift away, and say that this was the last."""
        if index != self.left.first:
            self.state = (x, v)
            return False
        if self.drifts:
            setting = self.left.setting
            worst, begin = torch.stack(self.drifts).amax(), self.left.begin
            setting.chain.drift.record(worst, setting.chain.name, setting.plan.tolerance, begin)
        return True

    def check(self, index: int, x: Tensor, v: Tensor | None, after: State | None, value: Tensor) -> None:
        """Hold one step from a known state against the state after it that was reconstructed (or kept)."""
        setting, carry = self.left.setting, self.left.setting.carry
        known = index == 0 or v is not None or setting.chain.steps[index].rule.decay == 0
        if not known or compiling(x) or isinstance(x, FakeTensor):
            return
        expected_x, expected_v = carry.advance(index, x, self.start if index == 0 else v, value.detach())
        if after is None:
            if self.left.size is not None:
                self.drifts.append(relative([(size_of(expected_x), self.left.size, None)]))
            return
        x_after, v_after = after
        pairs: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if index in setting.plan.snapshots:
            pairs.append((expected_x, x_after, None))
        if v_after is not None:
            v_after = carry.velocity(index + 1, v_after)
            pairs.append((carry.velocity(index + 1, expected_v), v_after, self.scale))
        self.drifts.append(relative(pairs))


def out_of_turn(chain: ChainSpec, index: int) -> BackwardError:
    """The error for a step whose backward comes when it cannot."""
    return BackwardError(
        f"{chain.name}: block {chain.steps[index].name!r} ran out of turn in backward; a backward through a chain has "
        "to start at the chain's outputs. A loss on a view that a hook kept has to be added to one on an output; let "
        "the hook keep a copy (.clone()), or the tensor that it is a view of"
    )


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    # Along a stride of 0 (expand) all values are one; it is written once.
    single = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    return torch.empty_strided(single.shape, strides, dtype=x.dtype, device=x.device).copy_(single).expand(x.shape)
