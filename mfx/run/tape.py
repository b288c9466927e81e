"""Tape: what one forward of a chain leaves for its backward.

1. :class:`Setting` is what all steps of one forward share, known before the first.
2. :class:`Recorder` collects, while forward runs, one :class:`Trace` a step; :class:`Left` is made of it when the
   segment ends (:mod:`mfx.run.reversible`), and nobody writes to it.
3. :class:`mfx.run.closing.Rewind` is made of :class:`Left` and the saved tensors when a backward begins.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.rule.arithmetic.carry import Floating
from mfx.rule.arithmetic.snapshots import Schedule
from mfx.rule.arithmetic.zeros import counted_zeros
from mfx.run.chain import ChainSpec, gradient_dtype
from mfx.run.conditions import Autocast
from mfx.run.linked.handover import Handover

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
    """What all steps of one forward have in common.

    ``symbolic`` says that there are no values, only shapes, ``linked`` that the chain may go on from others, and others
    from it.
    """

    chain: ChainSpec
    plan: Schedule
    root: nn.Module
    autocast: Autocast
    carry: Floating
    symbolic: bool
    observer: Observer | None = None
    linked: bool = False

    def apart(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether who reads a state in ``dtype`` has a copy of it, and nobody is told of it."""
        return x.dtype != dtype and self.observer is None and not x.is_nested

    def observe(self, index: int, x: Tensor, v: Tensor | None = None) -> None:
        """Tell the observer, if any, about a state."""
        if self.observer is not None:
            self.observer(self.chain.name, index, x, None if v is None else self.carry.velocity(index, v))


def is_observed() -> bool:
    """Whether somebody is to be told of the states of chains that start."""
    return bool(_observers)


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

    ``state`` is the one before the step that comes next, as carried; ``wanted`` the steps whose
    state later steps read; ``escapes`` is how many values the last step's branch hands out; ``zeros`` are the counts of
    :mod:`mfx.rule.arithmetic.zeros`, which began ``counted`` steps before.  A segment that ``goes_on`` from another
    chain's state gives that ``back``, and notes for that what ``ran``.  :class:`mfx.run.closing.Close` sets ``left``,
    and ``handover``, which has the state after the segment.
    """

    def __init__(self, dtype: torch.dtype, first: int, state: State, wanted: Set[int]) -> None:
        self.dtype = dtype
        self.first = first
        self.state = state
        self.wanted = wanted
        self.traces: list[Trace] = []
        self.snapshots: dict[int, State] = {}
        self.escapes = 0
        self.zeros: Tensor | None = None
        self.counted = 0
        self.goes_on = False
        self.back: Handover | None = None
        self.ran: list[Any] = []
        self.left: Left | None = None
        self.handover: Handover | None = None
        self.nothing: dict[torch.dtype, Tensor] = {}

    def go_on(self, holder: Handover | None, zeros: Tensor | None, counted: int) -> None:
        """Note that the state comes from another chain, whose it is for backward if that has a ``holder`` for it."""
        self.goes_on, self.back, self.zeros, self.counted = True, holder, zeros, counted

    def handed_over(self) -> dict[str, Any]:
        """What a chain that goes on from here needs, beside the state."""
        counted = self.counted + len(self.traces)
        return {"handover": self.handover, "zeros": self.zeros, "counted": counted}

    def enter(self, setting: Setting, index: int) -> Tensor:
        """x as step ``index`` computes with it; what the plan keeps of the state is kept."""
        x, v = self.state
        if index in setting.plan.snapshots:
            self.snapshots[index] = (x, v if setting.plan.keeps_velocity(index) else None)
        self.state = x, v = setting.carry.enter(index, x, v)
        setting.observe(0, x, v) if index == 0 else None
        # Counts of zeros are for states that are reconstructed in floating arithmetic (M2).
        if not (setting.plan.exact or setting.symbolic or len(setting.plan.snapshots) == len(setting.chain.steps)):
            self.zeros = counted_zeros(self.zeros, x, self.counted + len(self.traces), x.device.type == "cpu")
        return x

    def advance(self, setting: Setting, index: int, value: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
        """Go on to the state after a step, by its branch's value; gives what autograd takes for that state."""
        x, v = self.state
        # Who reads an earlier state has a copy of it, in the model's dtype.
        over = index > self.first and setting.apart(x, self.dtype)
        self.traces.append(Trace(self.dtype, x.stride(), differentiable))
        self.dtype = setting.chain.steps[index].result_dtype(self.dtype, value.dtype)
        self.state = x, v = setting.carry.advance(index, x, v, value, over)
        setting.observe(index + 1, x, v)
        own = gradient_dtype(self.dtype, x.dtype)
        return x.detach().to(own) if index in self.wanted else self._edge(x, own), self._edge(v, own)

    def _edge(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """What autograd takes for a state: its shape, and the dtype of its gradient; without values, if that can be."""
        if state.is_nested:
            return state.detach().to(dtype)
        zero = self.nothing.get(dtype)
        if zero is None:
            zero = self.nothing[dtype] = state.new_zeros((), dtype=dtype)
        return zero.expand(state.shape)

    @property
    def end(self) -> int:
        """The step that comes next."""
        return self.first + len(self.traces)


@dataclass(frozen=True, eq=False)
class Left:
    """What the forward of the steps ``begin`` to ``end`` leaves beside saved tensors.

    ``first`` is the first of them that a gradient comes by; ``layout`` tells the saved snapshots: the step, and whether
    v is there beside x; ``starts`` whether v_0 is saved, ``counts`` whether counts of zeros are; ``size`` is
    the norm of the last x where no end state is kept.  Of a linked chain that goes on from another, ``back`` takes the
    state before it, and ``counted`` is how many states before it were counted.
    """

    setting: Setting
    traces: tuple[Trace, ...]
    begin: int
    first: int | None
    layout: tuple[tuple[int, bool], ...]
    starts: bool
    size: Tensor | None
    counts: bool
    counted: int = 0
    goes_on: bool = False
    back: Callable[[State, Tensor | None], None] | None = None

    @staticmethod
    def of(setting: Setting, recorder: Recorder, starts: bool, size: Tensor | None) -> Left:
        """What is left when the segment has ended."""
        begin, traces = recorder.first, tuple(recorder.traces)
        first = next((index for index, trace in enumerate(traces, begin) if trace.differentiable), None)
        layout = tuple((index, v is not None) for index, (_, v) in recorder.snapshots.items())
        counts = recorder.zeros is not None and not setting.linked
        back = None if recorder.back is None else recorder.back.give
        return Left(
            setting, traces, begin, first, layout, starts, size, counts, recorder.counted, recorder.goes_on, back
        )

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
    """Where the steps of a segment find the :class:`mfx.run.closing.Rewind` of the backward that runs.

    ``beside`` has weak references to the values that hooks and modules keep of branches, by step and number among all
    that leave a step's branch.  ``joins`` see to their gradients (:mod:`mfx.run.beside`), where they can.
    """

    rewind: Any = None
    joins: Callable[[], Any] | None = None

    def __init__(self) -> None:
        self.beside: dict[tuple[int, int], Callable[[], Any]] = {}

    def note(self, index: int, first: int, values: Iterable[Any]) -> None:
        """Remember values from inside the branch of a step, those from number ``first`` on."""
        tensors = ((number, value) for number, value in enumerate(values, first) if isinstance(value, Tensor))
        self.beside |= {(index, number): weakref.ref(value) for number, value in tensors}

    def taken(self) -> dict[tuple[int, int], Tensor]:
        """Those that somebody still holds and that can be given another history; ``beside`` has the others."""
        held = {key: value for key, reference in self.beside.items() if (value := reference()) is not None}
        found = {key: value for key, value in held.items() if value.requires_grad and not value._is_view()}
        self.beside = {key: reference for key, reference in self.beside.items() if key not in found}
        return found

    def of_step(self, index: int) -> list[Callable[[], Any]]:
        """What ``beside`` has of a step."""
        return [reference for (step, _), reference in self.beside.items() if step == index]

    def corrected(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """What comes to the values beside, without what has been given to them already."""
        joins = None if self.joins is None else self.joins()
        return grads if joins is None else joins.corrected(grads)
