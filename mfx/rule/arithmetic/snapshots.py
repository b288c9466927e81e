"""Snapshots: in which dtype and arithmetic a chain carries its state, and where it keeps snapshots.  Pure.

The plan, for a chain of N steps, a dtype and a tolerance:

1. candidates: floating in the input's dtype; exact in a finer one (float64 over float32, float32 or float64 over the
   half precisions, which never carry the state themselves); for float64, exact in float64;
2. each walks through the steps and keeps a snapshot (x, v) before a step whose division would take the error, or
   the rounding, over the tolerance.  The first step of a run needs no division: what it started from is known;
3. a further candidate keeps every x, no v: activation checkpointing, all there is to do at gamma = 0 and the
   cheapest near it;
4. the fewest bytes win; among equals what is not two precisions up, then fewer snapshots, then floating arithmetic.

Before a step in ``cuts`` every candidate keeps the state: there the chain hands its x out, so x is there anyway
(:mod:`mfx.run.reversible`).  A dtype that the device lacks is no candidate.

Reference: the error model of :mod:`mfx.rule.arithmetic.precision`.
Known limits: its L is not known of a model.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mfx.errors import OptionError
from mfx.rule.arithmetic.precision import (
    BRANCH_GAIN,
    FINER,
    FINEST,
    MARGINS,
    Margin,
    Run,
    default_tolerance,
    digits,
    floating_error,
    roundoff,
)
from mfx.rule.base import Rule


@dataclass(frozen=True)
class Reached:
    """How far a chain is that goes on over several modules.

    ``steps`` since the state was kept last, or since the start; ``product`` of their decays but for the first one's;
    ``kept``: the last of them starts from a kept state.
    """

    steps: int = 0
    product: float = 1.0
    kept: bool = False


@dataclass(frozen=True)
class Schedule:
    """``state_dtype`` of (x, v), and the steps before which the state is kept.

    ``snapshots`` are step indices; at step i the kept state is x_i, and v_i too where step i - 1 has to be reversed
    from it.  ``tolerance`` is the relative error allowed, ``grid`` x's quantum relative to the largest element of the
    run's first x (0 in floating arithmetic), and ``quanta`` are v's first ones, for each run.  ``drift`` is the error
    that reversing may make (:mod:`mfx.rule.arithmetic.precision`; 0: bit for bit), ``rounding`` how far exact
    arithmetic may move the forward's x, both relative; ``velocities``: v is kept with every x that is.  ``reached`` is
    how far a linked chain (:mod:`mfx.rule.linked`) was before.

    >>> from mfx.rule.momentum import Momentum
    >>> schedule((Momentum(0.9),) * 100, torch.float32).state_count(100)
    2
    """

    state_dtype: torch.dtype
    snapshots: tuple[int, ...]
    tolerance: float = 1e-4
    grid: float = 0.0
    quanta: tuple[float, ...] = ()
    drift: float = 0.0
    rounding: float = 0.0
    velocities: bool = False
    reached: Reached | None = None

    @property
    def exact(self) -> bool:
        """Whether the state is carried in exact arithmetic."""
        return self.grid > 0

    def keeps_velocity(self, step: int) -> bool:
        """Whether the snapshot before ``step`` needs v beside x."""
        if step == 0 and self.reached is not None:
            return self.reached.steps > 0 and not self.reached.kept
        return step > 0 and (self.velocities or step - 1 not in self._kept)

    def state_count(self, steps: int) -> int:
        """How many tensors of x's size a chain of ``steps`` keeps for backward."""
        kept = sum(2 if self.keeps_velocity(step) else 1 for step in self.snapshots)
        return kept + (0 if steps - 1 in self._kept else 2)

    def bytes_an_element(self, steps: int) -> int:
        """What a chain of ``steps`` keeps for backward, for each element of x."""
        return self.state_count(steps) * self.state_dtype.itemsize

    def interval(self, steps: int) -> int:
        """The most steps between two kept states (``steps`` where only the end is kept)."""
        ends = [0, *self.snapshots, steps]
        return max(after - before for before, after in itertools.pairwise(ends))

    def note(self, steps: int) -> str:
        """The schedule of a chain of ``steps`` in words.

        >>> from mfx.rule.momentum import Momentum
        >>> schedule((Momentum(0.9),) * 300, torch.float32).note(300)
        'state in float64, exact, at most 152 steps to a snapshot (1 kept)'
        """
        dtype = str(self.state_dtype).removeprefix("torch.")
        if len(self.snapshots) == steps:
            return f"every x kept in {dtype}"
        arithmetic = "exact" if self.exact else f"drift up to {self.drift:.0e}"
        kept = f"at most {self.interval(steps)} steps to a snapshot ({len(self.snapshots)} kept)"
        return f"state in {dtype}, {arithmetic}, {kept if self.snapshots else 'no snapshots'}"

    def starts(self) -> tuple[int, ...]:
        """The first step of each run between kept states."""
        return (0, *(step for step in self.snapshots if step > 0))

    @functools.cached_property
    def _kept(self) -> frozenset[int]:
        return frozenset(self.snapshots)


@functools.lru_cache(maxsize=1024)
def schedule(
    rules: tuple[Rule, ...],
    dtype: torch.dtype,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
    compute: torch.dtype | None = None,
    cuts: tuple[int, ...] = (),
    float64: bool = True,
    velocities: bool = False,
) -> Schedule:
    """The cheapest schedule, in bytes, that keeps the tolerance.

    Args:
        rules: one for each step.
        dtype: of the chain's input.
        state_dtype: at least which dtype the state has; ``"auto"`` leaves the choice to the plan.
        tolerance: relative error allowed; None is :func:`default_tolerance` of the branches' dtype.
        compute: the dtype the branches compute in where it is coarser than ``dtype`` (autocast).
        cuts: steps before which the state is kept in any case.
        float64: whether the device has it.
        velocities: whether v is kept with every x that is kept, since the gradient of gamma is made of it.

    Returns:
        A :class:`Schedule`.

    Raises:
        OptionError: ``state_dtype`` is float64, and the device lacks it.

    >>> from mfx.rule.momentum import Momentum
    >>> schedule((Momentum(0.5),) * 8, torch.float32, "auto", 1e-2).note(8)
    'state in float32, drift up to 1e-03, no snapshots'
    >>> schedule((Momentum(0.5),) * 30, torch.float32).state_dtype
    torch.float64
    >>> schedule((Momentum(0.0),) * 4, torch.float32).snapshots
    (0, 1, 2, 3)
    >>> schedule((Momentum(0.9),) * 100, torch.float32, float64=False).state_dtype
    torch.float32
    """
    coarse = dtype if compute is None or roundoff(compute) < roundoff(dtype) else compute
    allowed = default_tolerance(coarse) if tolerance is None else tolerance
    if state_dtype == "auto":
        states = [state for state in (dtype, *FINER.get(dtype, ())) if state in FINEST]
        states = [state for state in states if float64 or state != torch.float64]
    else:
        states = [torch.promote_types(dtype, state_dtype)]  # type: ignore[arg-type]
        if states[0] == torch.float64 and not float64:
            raise OptionError(
                f"state_dtype={state_dtype!r}: the device of the chain's input has no float64. Leave the choice to the "
                'plan (state_dtype="auto"), which keeps snapshots instead'
            )
    found = list(_candidates(rules, states, coarse, allowed, frozenset(cuts)))
    kept = dtype if state_dtype == "auto" else states[0]
    found.append(Schedule(kept, tuple(range(len(rules))), allowed))
    found = [replace(one, velocities=velocities) for one in found]
    steps, far = len(rules), FINER.get(dtype, ())[1:]
    return min(
        found,
        key=lambda one: (one.bytes_an_element(steps), one.state_dtype in far, len(one.snapshots), one.exact),
    )


def _candidates(
    rules: tuple[Rule, ...],
    states: list[torch.dtype],
    compute: torch.dtype,
    allowed: float,
    cuts: frozenset[int],
) -> Iterator[Schedule]:
    for state in states:
        finer = roundoff(state) < roundoff(compute)
        if not finer:
            yield _floating(rules, state, max(roundoff(state), roundoff(compute)), allowed, cuts)
        if (finer or state == torch.float64) and state in FINEST:
            for share, aim, headroom, snapshots in MARGINS[compute]:
                found = _exact(rules, state, allowed, Margin(share * allowed, aim, headroom), cuts)
                if snapshots or cuts.issuperset(found.snapshots):
                    yield found


def _floating(
    rules: tuple[Rule, ...], state: torch.dtype, unit: float, allowed: float, cuts: frozenset[int]
) -> Schedule:
    """A snapshot wherever the next division would take the error over the tolerance."""
    start = floating_error((), unit)
    snapshots, error, worst = [], start, 0.0
    for step, rule in enumerate(rules[1:], 1):
        longer = error * rule.growth(BRANCH_GAIN)
        if longer > allowed or step in cuts:
            snapshots.append(step)
            error = start
        else:
            error = longer
            worst = max(worst, error)
    return Schedule(state, _with_first(snapshots), allowed, drift=worst)


def _exact(
    rules: tuple[Rule, ...], state: torch.dtype, allowed: float, margin: Margin, cuts: frozenset[int]
) -> Schedule:
    """A snapshot wherever the next division would leave the quanta too few bits."""
    grid = 2.0 ** -min(FINEST[state], math.ceil(-math.log2(allowed)) + 20)
    fresh = Run(digits(state), grid, margin)
    snapshots, runs = [], [fresh]
    for step, rule in enumerate(rules[1:], 1):
        longer = runs[-1].after(*rule.bounds)
        if rule.forgets or longer.rounding > margin.rounding or step in cuts:
            snapshots.append(step)
            runs.append(fresh)
        else:
            runs[-1] = longer
    quanta = tuple(run.quantum for run in runs)
    worst = max(run.rounding if run.steps > 1 else 0.0 for run in runs)
    return Schedule(state, _with_first(snapshots), allowed, grid, quanta, rounding=worst)


def _with_first(snapshots: list[int]) -> tuple[int, ...]:
    """Where x_1 is kept, x_0 costs no more than v_1, and needs no arithmetic."""
    return (0, *snapshots) if snapshots[:1] == [1] else tuple(snapshots)
