"""Carry: the arithmetic of a chain's state (x, v), forward and backward.

:class:`Floating` computes as the rule writes it.  :class:`Exact` is undone bit for bit, as long as
branches repeat themselves; :mod:`mfx.rule.arithmetic.precision` says when which is used and derives the numbers.  A
*run* is the steps from one kept state to the next.  In exact arithmetic

1. a run starts by putting x on a grid: multiples of a power of two, a fixed fraction of the run's largest element;
2. after its first step it carries v as whole numbers w of quanta, ``v = w q0 P`` with P the product of the decays
   of the steps since;
3. forward ``w <- w + round(pull F / (q0 P))``, ``x <- x + round_to_grid(v)``; backward the same with minus;
4. a run of a single step is undone from what was kept, and computed in floating arithmetic.

Rounding is done by adding and subtracting 1.5 * 2^(digits - 1), to which gradients, NaN and infinity are
transparent.  Both kinds of chain, reversible and stored, carry their state in this way, so they compute the same.
Where nobody else has a state, the next one may be written ``over`` it: memory that is new costs more than arithmetic.

Reference: Maclaurin, Duvenaud, Adams, "Gradient-based Hyperparameter Optimization through Reversible Learning",
ICML 2015, arXiv 1502.03492, section 2 (the bits that a decay loses have to be kept somewhere).
Known limits: see :mod:`mfx.rule.arithmetic.precision`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mfx.rule.arithmetic.snapshots import Schedule
from mfx.rule.step import StepSpec, advance, branch_of, retreat

_EXPONENT = {torch.float64: (torch.int64, 0x7FF0000000000000), torch.float32: (torch.int32, 0x7F800000)}
_BEFORE = -1
"""Stands for the first step of a run that began in another chain."""
_ROUNDER = {torch.float64: 1.5 * 2.0**52, torch.float32: 1.5 * 2.0**23}


class Floating:
    """The state as it is; x' - v' loses what x + v' rounded away."""

    def __init__(self, steps: tuple[StepSpec, ...], plan: Schedule) -> None:
        self.steps = steps
        self.plan = plan

    def enter(self, index: int, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as step ``index`` uses it, and v itself where the step starts a run."""
        return x, v

    def advance(
        self, index: int, x: Tensor, v: Tensor | None, value: Tensor, over: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The carried state after a step, from what :meth:`enter` gave and the branch's value."""
        return advance(self.steps[index], x, v, value)

    def x_before(self, index: int, x: Tensor, v: Tensor, over: bool = False) -> Tensor:
        """x before a step, from the carried state after it."""
        return self.steps[index].rule.x_before(x, v)

    def v_before(self, index: int, x: Tensor, v: Tensor, value: Tensor, over: bool = False) -> Tensor:
        """v before a step, from x before it, v after it and the branch's value at x."""
        return retreat(self.steps[index], x, v, value)

    def velocity(self, index: int, v: Tensor) -> Tensor:
        """v_index itself, from what is carried for it."""
        return v

    def go_on(self, before: Floating) -> None:
        """Take over the run that ``before`` is in after its last step."""


class Exact(Floating):
    """The state on grids; see the module.  ``kernels`` do the arithmetic."""

    def __init__(self, steps: tuple[StepSpec, ...], plan: Schedule, kernels: Kernels) -> None:
        super().__init__(steps, plan)
        self.kernels = kernels
        decays = tuple(step.rule.decay for step in steps)
        known = not any(isinstance(decay, Tensor) for decay in decays)
        self.places = (_places if known else _places.__wrapped__)(decays, plan)
        self.grids: dict[int, _Grid] = {}
        self.unit: Tensor | None = None  # what v_0 is carried in, where the chain goes on from another

    def go_on(self, before: Floating) -> None:
        assert isinstance(before, Exact)
        last = before.places[-1]
        self.grids[_BEFORE] = before.grids[last.start]
        self.unit = self.grids[_BEFORE].v * last.product

    def enter(self, index: int, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        place = self.places[index]
        if index != place.start:
            return x, v
        v = None if v is None else self.velocity(index, v)
        if place.alone:
            return x, v
        if index not in self.grids:
            self.grids[index] = _Grid.of(x, v, self.plan.grid, place.quantum)
        grid = self.grids[index]
        return _rounded(x, grid.per_x).mul_(grid.x), v

    def advance(
        self, index: int, x: Tensor, v: Tensor | None, value: Tensor, over: bool = False
    ) -> tuple[Tensor, Tensor]:
        place, step = self.places[index], self.steps[index]
        if place.alone:
            x, v = advance(step, x, v, value)
            return x.to(self.plan.state_dtype), v.to(self.plan.state_dtype)
        grid = self.grids[place.start]
        if index == place.start:
            _, v = advance(step, x, v, value)
            w = _rounded(v.to(x.dtype), grid.per_v)
        else:
            assert v is not None
            return self.kernels.forward(x, v, *self._branch(index, x, value), self._ratio(index), grid.x, over)
        return x + moved(w, self._ratio(index), grid.x), w

    def x_before(self, index: int, x: Tensor, v: Tensor, over: bool = False) -> Tensor:
        if self.places[index].alone:
            return super().x_before(index, x, v)
        return self.kernels.x_before(x, v, self._ratio(index), self.grids[self.places[index].start].x, over)

    def v_before(self, index: int, x: Tensor, v: Tensor, value: Tensor, over: bool = False) -> Tensor:
        if index == self.places[index].start:
            return retreat(self.steps[index], x, self.velocity(index + 1, v), value)
        return self.kernels.w_before(v, *self._branch(index, x, value), over)

    def velocity(self, index: int, v: Tensor) -> Tensor:
        if index == 0:
            return v if self.unit is None else v * self.unit
        place = self.places[index - 1]
        if place.alone:
            return v
        return v * (self.grids[place.start].v * place.product)

    def _branch(self, index: int, x: Tensor, value: Tensor) -> tuple[Tensor, bool, Tensor]:
        """F(x), whether nobody else has it, and what it is multiplied by to be added to w."""
        step, place = self.steps[index], self.places[index]
        given = value if step.scale == 1.0 else value.to(x.dtype)
        branch = branch_of(step, x, given)
        per_w = self.grids[place.start].per_v * (step.rule.pull / place.product)
        return branch, branch is not value and not per_w.requires_grad, per_w

    def _ratio(self, index: int) -> float | Tensor:
        """The quantum of w at a step, in that of x."""
        place = self.places[index]
        return place.quantum / self.plan.grid * place.product


@dataclass(frozen=True)
class Kernels:
    """What is computed of whole states in exact arithmetic; :data:`EAGER` has the meaning."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    x_before: Callable[..., Tensor]
    w_before: Callable[..., Tensor]


def moved(w: Tensor, ratio: Tensor | float, unit: Tensor) -> Tensor:
    """What a step moves x by."""
    return _rounded(w, ratio).mul_(unit)


def forward(
    x: Tensor,
    w: Tensor,
    branch: Tensor,
    own: bool,
    per_w: Tensor,
    ratio: Tensor | float,
    unit: Tensor,
    over: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x', w') of a step, from the state before and F(x), which is used up if it is ``own``."""
    added = _rounded(branch.to(x.dtype), per_w, own or branch.dtype != x.dtype)
    if not over:
        w = added.add_(w)
        return x + moved(w, ratio, unit), w
    w.add_(added)
    by = _whole(torch.mul(w, ratio, out=added)).mul_(unit)
    return x.add_(by), w


def x_before(x: Tensor, w: Tensor, ratio: Tensor | float, unit: Tensor, over: bool = False) -> Tensor:
    """x from (x', w')."""
    by = moved(w, ratio, unit)
    return x.sub_(by) if over else torch.sub(x, by, out=by)


def w_before(w: Tensor, branch: Tensor, own: bool, per_w: Tensor, over: bool = False) -> Tensor:
    """w from w' and F(x), which is used up if it is ``own``."""
    added = _rounded(branch.to(w.dtype), per_w, own or branch.dtype != w.dtype)
    return w.sub_(added) if over else torch.sub(w, added, out=added)


EAGER = Kernels(forward, x_before, w_before)


def carry(steps: tuple[StepSpec, ...], plan: Schedule, kernels: Kernels = EAGER) -> Floating:
    """The arithmetic that ``plan`` asks for."""
    return Exact(steps, plan, kernels) if plan.exact else Floating(steps, plan)


@dataclass(frozen=True)
class _Place:
    """Where a step is: the first step of its run, the product of decays from there, q0 of the run."""

    start: int
    product: float | Tensor
    quantum: float
    alone: bool


@functools.lru_cache(maxsize=1024)
def _places(decays: tuple[float | Tensor, ...], plan: Schedule) -> tuple[_Place, ...]:
    starts, reached = plan.starts(), plan.reached
    places: list[_Place] = []
    for start, end, quantum in zip(starts, [*starts[1:], len(decays)], plan.quanta, strict=True):
        goes_on = start == 0 and 0 not in plan.snapshots and reached is not None and reached.steps > 0
        products: list[float | Tensor] = [reached.product * decays[0] if goes_on and reached is not None else 1.0]
        for decay in decays[start + 1 : end]:
            products.append(products[-1] * decay)
        alone = end - start == 1 and reached is None
        places += [_Place(_BEFORE if goes_on else start, product, quantum, alone) for product in products]
    return tuple(places)


@dataclass(frozen=True)
class _Grid:
    """The quanta of a run and their inverses, as tensors without dimensions: they depend on data, unseen."""

    x: Tensor
    per_x: Tensor
    v: Tensor
    per_v: Tensor

    @staticmethod
    def of(x: Tensor, v: Tensor | None, grid: float, quantum: float) -> _Grid:
        """The grid of the run that starts from (x, v)."""
        largest = _largest(x) if v is None else torch.maximum(_largest(x), _largest(v.to(x.dtype)))
        unit = _power_of_two(largest)
        return _Grid(unit * grid, 1 / (unit * grid), unit * quantum, 1 / (unit * quantum))


def _largest(x: Tensor) -> Tensor:
    """The largest finite absolute value."""
    size = x.detach().abs()
    if size.numel() == 0:
        return x.new_zeros(())
    return torch.where(size.isfinite(), size, 0.0).amax()


def _power_of_two(size: Tensor) -> Tensor:
    """The power of two above a number, by its exponent bits; 2 for zero."""
    integer, mask = _EXPONENT[size.dtype]
    power = (size.view(integer) & mask).view(size.dtype) * 2
    return torch.where(power > 0, power, 2.0)


def _rounded(x: Tensor, factor: Tensor | float, own: bool = False) -> Tensor:
    """``round(x * factor)``, a new tensor or (``own``) x itself; the gradient is that of ``x * factor``."""
    return _whole(x.mul_(factor) if own else x * factor)


def _whole(x: Tensor) -> Tensor:
    rounder = _ROUNDER[x.dtype]
    return x.add_(rounder).sub_(rounder)
