"""Precision: in which dtype and arithmetic a chain carries its state, and where it keeps snapshots.  Pure.

Backward, a step first takes ``x <- x - v`` and then ``v <- (v - (1 - gamma) F(x)) / gamma``.  What goes wrong on
the way, with u the unit roundoff of the state's dtype and e = (e_x, e_v) the error of the state:

*Floating arithmetic.*  Each step adds an error of size 4 u (four roundings), and carries the one it finds over to

    e_x <- e_x - e_v,    e_v <- (e_v - (1 - gamma) J e_x) / gamma,    J the Jacobian of F.

For ``|J| <= L`` the largest eigenvalue of this map is the *growth* of a step,

    g(gamma) = (t + sqrt(t^2 - 4 / gamma)) / 2,    t = 1 + (1 + (1 - gamma) L) / gamma,

which is 1 / gamma for L = 0 (the division alone).  After reversing a run of steps the error is ``4 u prod(g)``.
L is :data:`BRANCH_GAIN` = 1: measured in float32, stacks with normalization, or without it in PyTorch's default
initialization, behave as L = 0, and ReLU stacks in Kaiming initialization without any normalization, whose x grows
exponentially, as L = 1 (an error of 1e-4 after 19, 10, 6 steps at gamma 0.9, 0.7, 0.5; the rule says 15, 7, 4).

*A finer state alone does not help as much as it seems.*  A branch that computes in float32 sees x rounded to
float32.  If x is off by e, a share e / u of its elements rounds to the neighbour, u away; the root mean square
of what the branch sees is off by sqrt(e u), much more than e: from 1e-16 to 2e-12 in a step, to 1e-9 in the next.
Small tensors do not show it (no element happens to flip), large ones always do.

*Exact arithmetic.*  So a state finer than the branches' dtype is carried on grids on which nothing is ever rounded
backward (:mod:`mfx.carry`): x as multiples of a power of two, and v as whole numbers w of quanta that shrink with
the steps, ``v_k = w_k q0 gamma^k``.  Then ``w <- w + round((1 - gamma) F / (q0 gamma^k))`` and ``x <- x + round(v)``
are undone bit for bit, and the branch sees the same bits.  The price is that a run of steps needs
log2(1 / prod(gamma)) of the state's bits; the rest, less some bits for velocities larger than x_0, is the precision
of the first quantum q0.  The rounding of step k shifts x_N by its quantum / sqrt(12) times what the
velocity sums to after it, so the forward's *rounding* relative to the largest ``|x_0|`` of the run is

    q0 / sqrt(12) * sqrt(sum_k (P_k + ... + P_N)^2),    P_k = gamma_1 ... gamma_k,

and that of x's own grid, sqrt(N / 12) quanta.  It may take up a share of the tolerance (:data:`MARGINS`).

The plan, for a chain of N steps, a dtype and a tolerance:

1. candidates: floating in the input's dtype; exact in a finer one (one precision up: float64 over float32, float32
   over the half precisions, which never carry the state themselves); for float64, exact in float64;
2. each walks through the steps and keeps a snapshot (x, v) before a step whose division would take the error, or
   the rounding, over the tolerance.  The first step of a run needs no division: what it started from is known;
3. a further candidate keeps every x, no v: activation checkpointing, all there is to do at gamma = 0 and the
   cheapest near it;
4. the fewest bytes win; among equals fewer snapshots, then floating arithmetic.

Where a recomputation repeats the forward up to rounding only (``same_branches=False``: code that a compiler fuses in
another way forward and backward), exact arithmetic buys nothing, and floating arithmetic counts with the branches'
roundoff.

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.2 (exact reversal with finite precision); Maclaurin
et al., "Gradient-based Hyperparameter Optimization through Reversible Learning", arXiv 1502.03492, section 2.
Known limits: L is not known of a model, so a chain whose branches amplify more than that drifts more: the drift
detector says so.  Exact arithmetic wants |v| below 32 times the largest |x_0| of its run (4 times for the longest
runs, and in float64 over float64) and |x| below 2^19 times (2^9 in float64 over float64, 2^7 in float32 over the half
precisions): beyond, single elements fall back to floating arithmetic, which again the detector sees.  Only networks
whose activations grow from block to block by orders of magnitude get there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

BRANCH_GAIN = 1.0
"""L: by how much the branches are taken to amplify an error of x."""

MARGINS = {
    torch.float64: ((1.0, 1 / 64, 2, True),),
    torch.float32: ((1 / 300, 1 / 4, 5, True), (1 / 10, 1 / 4, 2, False)),
    torch.bfloat16: ((1 / 40, 1 / 4, 2, True),),
    torch.float16: ((1 / 40, 1 / 4, 2, True),),
}
"""For exact arithmetic, by the branches' dtype: the share of the tolerance that the forward's rounding may take up,
the share of that which is aimed at (the bits that are left make room for large velocities), the bits for that at
least, and whether snapshots are taken: a chain that can do without any may have less of both."""

_ROUNDINGS = 4
"""What a step does to the state: a product, two sums, a difference or quotient."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_ONE_UP = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
_FINEST = {torch.float64: 44, torch.float32: 17}
"""x's quantum is never finer than 2 to the minus this, relative to x_0: what is left is headroom."""


@dataclass(frozen=True)
class Schedule:
    """``state_dtype`` of (x, v), and the steps before which the state is kept.

    ``snapshots`` are step indices; at step i the kept state is x_i, and v_i too where step i - 1 has to be reversed
    from it.  ``tolerance`` is the relative error allowed, ``grid`` x's quantum relative to the largest element of the
    run's first x (0 in floating arithmetic), and ``quanta`` are v's first ones, for each run.  ``drift`` is the error
    that reversing may make by the model of this module (0: bit for bit), ``rounding`` how far exact arithmetic may
    move the forward's x, both relative.

    >>> schedule((0.9,) * 100, torch.float32).state_count(100)
    2
    """

    state_dtype: torch.dtype
    snapshots: tuple[int, ...]
    tolerance: float = 1e-4
    grid: float = 0.0
    quanta: tuple[float, ...] = ()
    drift: float = 0.0
    rounding: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the state is carried in exact arithmetic."""
        return self.grid > 0

    def keeps_velocity(self, step: int) -> bool:
        """Whether the snapshot before ``step`` needs v beside x."""
        return step > 0 and step - 1 not in self._kept

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

        >>> schedule((0.9,) * 300, torch.float32).note(300)
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


def default_tolerance(dtype: torch.dtype) -> float:
    """The relative error a chain in ``dtype`` may make when ``tolerance=None``."""
    return _TOLERANCE.get(dtype, 1e-4)


def growth(gamma: float, gain: float = BRANCH_GAIN) -> float:
    """By which factor reversing a step may amplify an error of the state.

    >>> round(growth(0.5, gain=0.0), 3), round(growth(0.5), 3)
    (2.0, 3.414)
    """
    if gamma == 0:
        return math.inf
    trace = 1 + (1 + (1 - gamma) * gain) / gamma
    return (trace + math.sqrt(trace * trace - 4 / gamma)) / 2


def floating_error(gammas: Iterable[float], roundoff: float) -> float:
    """The relative error after dividing by each of ``gammas`` in floating arithmetic."""
    return math.prod((growth(gamma) for gamma in gammas), start=_ROUNDINGS * roundoff)


@functools.lru_cache(maxsize=1024)
def schedule(
    gammas: tuple[float, ...],
    dtype: torch.dtype,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
    compute: torch.dtype | None = None,
    same_branches: bool = True,
) -> Schedule:
    """The cheapest schedule, in bytes, that keeps the tolerance.

    Args:
        gammas: one for each step.
        dtype: of the chain's input.
        state_dtype: at least which dtype the state has; ``"auto"`` leaves the choice to the plan.
        tolerance: relative error allowed; None is :func:`default_tolerance` of the branches' dtype.
        compute: the dtype the branches compute in where it is coarser than ``dtype`` (autocast).
        same_branches: whether a recomputed branch gives the same bits as in the forward.

    Returns:
        A :class:`Schedule`.

    >>> schedule((0.5,) * 8, torch.float32, "auto", 1e-2).note(8)
    'state in float32, drift up to 1e-03, no snapshots'
    >>> schedule((0.5,) * 30, torch.float32).state_dtype
    torch.float64
    >>> schedule((0.0,) * 4, torch.float32).snapshots
    (0, 1, 2, 3)
    """
    coarse = dtype if compute is None or _roundoff(compute) < _roundoff(dtype) else compute
    allowed = default_tolerance(coarse) if tolerance is None else tolerance
    if state_dtype == "auto":
        states = [state for state in (dtype, _ONE_UP.get(dtype)) if state in _FINEST]
    else:
        states = [torch.promote_types(dtype, state_dtype)]  # type: ignore[arg-type]
    found = list(_candidates(gammas, states, coarse, allowed, same_branches))
    kept = dtype if state_dtype == "auto" else states[0]
    found.append(Schedule(kept, tuple(range(len(gammas))), allowed))
    steps = len(gammas)
    return min(found, key=lambda one: (one.bytes_an_element(steps), len(one.snapshots), one.exact))


def _candidates(
    gammas: tuple[float, ...], states: list[torch.dtype], compute: torch.dtype, allowed: float, same_branches: bool
) -> Iterator[Schedule]:
    for state in states:
        finer = _roundoff(state) < _roundoff(compute)
        if not (finer and same_branches):
            yield _floating(gammas, state, max(_roundoff(state), _roundoff(compute)), allowed)
        if same_branches and (finer or state == torch.float64) and state in _FINEST:
            for share, aim, headroom, snapshots in MARGINS[compute]:
                found = _exact(gammas, state, allowed, _Margin(share * allowed, aim, headroom))
                if snapshots or not found.snapshots:
                    yield found


def _floating(gammas: tuple[float, ...], state: torch.dtype, roundoff: float, allowed: float) -> Schedule:
    """A snapshot wherever the next division would take the error over the tolerance."""
    start = floating_error((), roundoff)
    snapshots, error, worst = [], start, 0.0
    for step, gamma in enumerate(gammas[1:], 1):
        longer = error * growth(gamma)
        if longer > allowed:
            snapshots.append(step)
            error = start
        else:
            error = longer
            worst = max(worst, error)
    return Schedule(state, _with_first(snapshots), allowed, drift=worst)


def _exact(gammas: tuple[float, ...], state: torch.dtype, allowed: float, margin: _Margin) -> Schedule:
    """A snapshot wherever the next division would leave the quanta too few bits."""
    grid = 2.0 ** -min(_FINEST[state], math.ceil(-math.log2(allowed)) + 20)
    fresh = _Run(_digits(state), grid, margin)
    snapshots, runs = [], [fresh]
    for step, gamma in enumerate(gammas[1:], 1):
        longer = runs[-1].after(gamma)
        if gamma == 0 or longer.rounding > margin.rounding:
            snapshots.append(step)
            runs.append(fresh)
        else:
            runs[-1] = longer
    quanta = tuple(run.quantum for run in runs)
    worst = max(run.rounding if run.steps > 1 else 0.0 for run in runs)
    return Schedule(state, _with_first(snapshots), allowed, grid, quanta, rounding=worst)


@dataclass(frozen=True)
class _Margin:
    """What exact arithmetic has to keep to: the forward's rounding, and bits for large velocities."""

    rounding: float
    aim: float
    headroom: int


@dataclass(frozen=True)
class _Run:
    """A run of steps in exact arithmetic: the sums of P_k (see the module) that its rounding takes."""

    digits: int
    grid: float
    margin: _Margin
    product: float = 1.0
    steps: int = 1
    total: float = 1.0
    sums: float = 0.0
    squares: float = 0.0

    def after(self, gamma: float) -> _Run:
        """The run with one step more."""
        return replace(
            self,
            product=self.product * gamma,
            steps=self.steps + 1,
            total=self.total + self.product * gamma,
            sums=self.sums + self.total,
            squares=self.squares + self.total**2,
        )

    @property
    def quantum(self) -> float:
        """q0, relative to the largest element of the first x: what is aimed at, if the bits suffice."""
        bits = self.digits - self.margin.headroom
        bits -= math.ceil(-math.log2(self.product)) if self.product > 0 else 1000
        return 2.0 ** -min(bits, math.ceil(math.log2(self._shift / (self.margin.aim * self.margin.rounding))))

    @property
    def rounding(self) -> float:
        """How far the run may move x, relative to the largest element of its first x."""
        return math.hypot(self._shift * self.quantum, self.grid * math.sqrt(self.steps / 12))

    @property
    def _shift(self) -> float:
        """By how many q0 the rounding of w moves x."""
        tails = self.steps * self.total**2 - 2 * self.total * self.sums + self.squares
        return math.sqrt(max(tails, 1.0) / 12)


def _with_first(snapshots: list[int]) -> tuple[int, ...]:
    """Where x_1 is kept, x_0 costs no more than v_1, and needs no arithmetic."""
    return (0, *snapshots) if snapshots[:1] == [1] else tuple(snapshots)


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _digits(dtype: torch.dtype) -> int:
    return round(-math.log2(_roundoff(dtype)))
