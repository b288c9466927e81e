"""Precision: the error that reversing a chain makes, in floating and in exact arithmetic.  Pure.

Backward, a step takes x and then v to what they were (:mod:`mfx.rule.base`), which divides by the rule's decay.  What
goes wrong on the way, with u the unit roundoff of the state's dtype:

*Floating arithmetic.*  Each step adds an error of size 4 u (four roundings), and what it finds is amplified by at most
the rule's *growth* g for ``|J| <= L``, J the Jacobian of F; for L = 0 that is 1 / decay, the division alone.  After
reversing a run of steps the error is ``4 u prod(g)``.
L is :data:`BRANCH_GAIN` = 1: measured in float32, stacks with normalization, or without it in PyTorch's default
initialization, behave as L = 0, and ReLU stacks in Kaiming initialization without any normalization, whose x grows
exponentially, as L = 1 (an error of 1e-4 after 19, 10, 6 steps at gamma 0.9, 0.7, 0.5; the rule says 15, 7, 4).

*A finer state alone does not help as much as it seems.*  A branch that computes in float32 sees x rounded to
float32.  If x is off by e, a share e / u of its elements rounds to the neighbour, u away; the root mean square
of what the branch sees is off by sqrt(e u), much more than e: from 1e-16 to 2e-12 in a step, to 1e-9 in the next.
Small tensors do not show it (no element happens to flip), large ones always do.

*Exact arithmetic.*  So a state finer than the branches' dtype is carried on grids on which nothing is ever rounded
backward (:mod:`mfx.rule.arithmetic.carry`): x as multiples of a power of two, and v as whole numbers w of quanta that
shrink with the steps, ``v_k = w_k q0 P_k`` with P_k the product of the decays.  Then ``w <- w + round(pull F / (q0
P_k))`` and ``x <- x + round(v)`` are undone bit for bit, and the branch sees the same bits.  The price is that a run of
steps needs log2(1 / |prod(decay)|) of the state's bits; the rest, less some bits for velocities larger than x_0, is the
precision of the first quantum q0.  The rounding of step k shifts x_N by its quantum / sqrt(12) times what the
velocity sums to after it, so the forward's *rounding* relative to the largest ``|x_0|`` of the run is

    q0 / sqrt(12) * sqrt(sum_k (P_k + ... + P_N)^2),    P_k = decay_1 ... decay_k,

and that of x's own grid, sqrt(N / 12) quanta.  It may take up a share of the tolerance (:data:`MARGINS`).

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.2 (exact reversal with finite precision); Maclaurin
et al., "Gradient-based Hyperparameter Optimization through Reversible Learning", arXiv 1502.03492, section 2.
Known limits: L is not known of a model, so a chain whose branches amplify more than that drifts more: the drift
detector says so.  Exact arithmetic wants |v| below 32 times the largest |x_0| of its run (4 times for the longest
runs, and in float64 over float64) and |x| below 2^19 times (2^9 in float64 over float64, 2^7 in float32 over the half
precisions): beyond, single elements fall back to floating arithmetic, which again the detector sees.  Only networks
whose activations grow from block to block by orders of magnitude get there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from mfx.rule.base import Rule

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
_HALF = (torch.float32, torch.float64)
FINER = {torch.float32: (torch.float64,), torch.bfloat16: _HALF, torch.float16: _HALF}
"""In which finer dtypes a state may be carried, the first one first."""
FINEST = {torch.float64: 44, torch.float32: 17}
"""x's quantum is never finer than 2 to the minus this, relative to x_0: what is left is headroom."""


def default_tolerance(dtype: torch.dtype) -> float:
    """The relative error a chain in ``dtype`` may make when ``tolerance=None``."""
    return _TOLERANCE.get(dtype, 1e-4)


def floating_error(rules: Iterable[Rule], roundoff: float) -> float:
    """The relative error after undoing a step by each of ``rules`` in floating arithmetic."""
    return math.prod((rule.growth(BRANCH_GAIN) for rule in rules), start=_ROUNDINGS * roundoff)


@dataclass(frozen=True)
class Margin:
    """What exact arithmetic has to keep to: the forward's rounding, and bits for large velocities."""

    rounding: float
    aim: float
    headroom: int


@dataclass(frozen=True)
class Run:
    """A run of steps in exact arithmetic: the sums of P_k (see the module) that its rounding takes."""

    digits: int
    grid: float
    margin: Margin
    product: float = 1.0
    reach: float = 1.0
    steps: int = 1
    total: float = 1.0
    sums: float = 0.0
    squares: float = 0.0

    def after(self, least: float, most: float) -> Run:
        """The run with one step more, of which at least and at most that much of the velocity survives."""
        return replace(
            self,
            product=self.product * least,
            reach=self.reach * most,
            steps=self.steps + 1,
            total=self.total + self.reach * most,
            sums=self.sums + self.total,
            squares=self.squares + self.total**2,
        )

    @property
    def quantum(self) -> float:
        """q0, relative to the largest element of the first x: what is aimed at, if the bits suffice."""
        bits = self.digits - self.margin.headroom
        bits -= math.ceil(-math.log2(abs(self.product))) if self.product else 1000
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


def roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def digits(dtype: torch.dtype) -> int:
    """The bits of a number."""
    return round(-math.log2(roundoff(dtype)))
