"""Precision: in which dtype a chain carries its state, and where it keeps snapshots.

The inverse of a step divides the error of the velocity by its gamma, so after reversing a run of steps the
error is about ``eps / prod(gamma)``, eps being the unit roundoff of the state's dtype.  A run is ended by a
snapshot before the estimate passes ``tolerance``:

1. walk through the steps from the first one, with an error budget of ``log(tolerance / eps)``;
2. each step spends ``log(1 / gamma)`` of it; where that overdraws the budget the state before the step is
   kept, and the budget starts anew;
3. the first step of a chain never needs a division: v_0 is known and x_0 = x_1 - v_1.

For one gamma the distance of snapshots is ``K = floor(log(tolerance / eps) / log(1 / gamma))``, at least 1.
At gamma = 0 nothing can be inverted and every block's input is kept: activation checkpointing.

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.2 (exact reversal with finite precision).
Known limits: the estimate leaves out the factor by which the branches themselves amplify errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Schedule:
    """``state_dtype`` of (x, v), and the steps before which the state is kept.

    ``snapshots`` are step indices; at step i the kept state is x_i, and v_i too where step i - 1 has to be
    reversed from it.
    """

    state_dtype: torch.dtype
    snapshots: tuple[int, ...]

    def keeps_velocity(self, step: int) -> bool:
        """Whether the snapshot before ``step`` needs v beside x."""
        return step > 0 and step - 1 not in self.snapshots

    def state_count(self, steps: int) -> int:
        """How many tensors of x's size a chain of ``steps`` keeps for backward."""
        kept = sum(2 if self.keeps_velocity(step) else 1 for step in self.snapshots)
        return kept + (0 if steps - 1 in self.snapshots else 2)


def default_tolerance(dtype: torch.dtype) -> float:
    """The relative error a chain in ``dtype`` may make when ``tolerance=None``."""
    return _TOLERANCE.get(dtype, 1e-4)


def schedule(
    gammas: tuple[float, ...],
    dtype: torch.dtype,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
) -> Schedule:
    """The schedule of a chain with these gammas whose input has ``dtype``.

    >>> schedule((0.5,) * 20, torch.float32).snapshots
    (11,)
    """
    state = dtype if state_dtype == "auto" else torch.promote_types(dtype, state_dtype)  # type: ignore[arg-type]
    allowed = default_tolerance(dtype) if tolerance is None else tolerance
    budget = max(math.log(allowed / (torch.finfo(state).eps / 2)), 0.0)
    snapshots, left = [], budget
    for step, gamma in enumerate(gammas):
        if step == 0:
            continue
        cost = math.inf if gamma == 0 else -math.log(gamma)
        if cost > left:
            snapshots.append(step)
            left = budget
        else:
            left -= cost
    return Schedule(state, tuple(snapshots))
