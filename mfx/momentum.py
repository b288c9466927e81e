"""The momentum recurrence and its inverse.  Knows tensors and callables, no graphs.

A chain of N blocks carries a state (x, v).  Forward, for block i with branch F_i::

    v <- gamma_i * v + (1 - gamma_i) * F_i(x)
    x <- x + v

and backwards::

    x <- x - v
    v <- (v - (1 - gamma_i) * F_i(x)) / gamma_i

A wrapped block computes ``G(x)``, with ``F(x) = G(x) - x``.  gamma = 0 is the model itself, exactly: x' is then
``x + F(x)`` (or ``G(x)``) as the model computes it.

Reference: Sander, Ablin, Blondel, Peyre, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870,
equations (5) and (6).  Known limits: see :mod:`mfx.reversible`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mfx.drift import Drift
from mfx.errors import ShapeError
from mfx.precision import Schedule


@dataclass(frozen=True)
class State:
    """The state after a step of the same chain, as a side value of a later one."""

    step: int


@dataclass(frozen=True)
class Escape:
    """A branch value handed out by a step of the same chain, as a side value of a later one."""

    step: int
    number: int


@dataclass(frozen=True, eq=False)
class StepSpec:
    """One block, as far as running it needs.

    ``branch(root, x, *sides) -> (value, *escapes)``.  Of its ``sides``, None stands for a value from outside the
    chain.  Its operands are the values from outside, then one tensor for each of ``parameters``, which are given
    by all their names (path of the owner, name) in the branch.  ``again`` is the branch as it is recomputed: it
    moves no running statistics, which are the sides numbered in ``statistics``.  ``modules`` are called whole by
    the branch, ``buffers`` read by it; ``draws`` says whether it may draw random numbers, ``sees_grad_mode``
    whether it may compute otherwise without gradient (fast paths of attention).  ``written`` is the operand
    ("skip" or "branch") that an in-place add of the original wrote into, whose dtype the result has; ``branch_first``
    says whether its add takes the branch first, which may decide the memory format of the sum, and so what later
    dropout draws.
    """

    name: str
    branch: Callable[..., tuple[Any, ...]]
    again: Callable[..., tuple[Any, ...]]
    gamma: float
    wrapped: bool
    scale: float
    written: str
    sides: tuple[State | Escape | None, ...]
    parameters: tuple[tuple[tuple[str, str], ...], ...]
    modules: tuple[str, ...]
    buffers: tuple[tuple[str, str], ...]
    statistics: frozenset[int]
    draws: bool
    sees_grad_mode: bool
    branch_first: bool = False

    def result_dtype(self, x: torch.dtype, value: torch.dtype) -> torch.dtype:
        """The dtype that the original's add gives."""
        if self.wrapped or self.written == "branch":
            return value
        return x if self.written == "skip" else torch.promote_types(x, value)


@dataclass(frozen=True, eq=False)
class ChainSpec:
    """A chain, as far as running it needs.

    ``taps`` are the steps whose result is handed out as well; ``copied`` the positions among all values handed
    out that somebody outside will write to in place, and that are therefore handed out as copies.
    ``schedule(dtype, compute, same_branches)`` is that of :func:`mfx.precision.schedule`;
    ``drift`` takes what its backwards measure.
    """

    name: str
    steps: tuple[StepSpec, ...]
    schedule: Callable[..., Schedule]
    taps: tuple[int, ...] = ()
    copied: frozenset[int] = frozenset()
    reversible: bool = True
    index: int = 0
    drift: Drift = field(default_factory=Drift)


def advance(step: StepSpec, x: Tensor, v: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
    """One step: (x, v) and the branch's value to (x', v').  ``v`` None stands for zero."""
    state = torch.promote_types(x.dtype, step.result_dtype(x.dtype, value.dtype))
    x, value = x.to(state), value.to(state)
    branch = branch_of(step, x, value)
    if step.gamma == 0 and step.wrapped:
        return value, branch
    if step.scale != 1.0:
        branch = branch * step.scale
    if step.gamma == 0:
        return branch + x if step.branch_first else x + branch, branch
    v = branch * (1 - step.gamma) if v is None else torch.add(v * step.gamma, branch, alpha=1 - step.gamma)
    return x + v, v


def retreat(step: StepSpec, x: Tensor, v: Tensor, value: Tensor) -> Tensor:
    """The velocity before a step, from x before it, v' after it and the branch's value at x."""
    branch = branch_of(step, x, value.to(v.dtype))
    return torch.sub(v, branch, alpha=step.scale * (1 - step.gamma)).div_(step.gamma)


def check_velocity(chain: str, x: Tensor, v: Tensor | None) -> None:
    """A velocity of another shape would broadcast."""
    if v is not None and v.shape != x.shape:
        raise ShapeError(
            f"{chain}: v_0 has shape {tuple(v.shape)}, but x has shape {tuple(x.shape)}. What gives the velocity "
            "(init_function, velocity=) has to keep the shape of x"
        )


def branch_of(step: StepSpec, x: Tensor, value: Tensor) -> Tensor:
    """F(x), but for the step's ``scale``, from the branch's value."""
    if value.shape != x.shape:
        raise ShapeError(
            f"block {step.name!r}: its branch returned shape {tuple(value.shape)}, but x has shape "
            f"{tuple(x.shape)}. Pass example_inputs= so that shapes are known when planning, or keep the block "
            f"as it is with exclude={step.name!r}"
        )
    return value - x if step.wrapped else value


def stored(
    chain: ChainSpec,
    carry: Carry,
    root: nn.Module,
    x: Tensor,
    v: Tensor | None,
    operands: Sequence[Sequence[Any]],
    dtype: torch.dtype,
) -> tuple[Any, ...]:
    """The plain recurrence: autograd stores what it needs, if anything."""
    inner = Inner(chain)
    for index, step in enumerate(chain.steps):
        own = inner.operands(index, operands[index])
        x, v = carry.enter(index, x, v)
        value, *extra = step.branch(root, x.to(dtype), *own[: len(step.sides)])
        dtype = step.result_dtype(dtype, value.dtype)
        x, v = carry.advance(index, x, v, value)
        inner.record(x.to(dtype), extra)
    return (x.to(dtype), *inner.handed_out())


class Carry(Protocol):
    """The arithmetic of the state, as far as going forward needs it; see :mod:`mfx.carry`."""

    def enter(self, index: int, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]: ...

    def advance(self, index: int, x: Tensor, v: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]: ...


class Inner:
    """The values of a chain that later steps of it, or others, read."""

    def __init__(self, chain: ChainSpec) -> None:
        self.chain = chain
        self.states: dict[int, Tensor] = {}
        self.escapes: list[list[Any]] = []
        self.wanted = {side.step for step in chain.steps for side in step.sides if isinstance(side, State)}

    def operands(self, index: int, outer: Sequence[Any]) -> list[Any]:
        """A step's side values, then its parameters."""
        given = iter(outer)
        sides = [next(given) if side is None else self._value(side) for side in self.chain.steps[index].sides]
        return [*sides, *given]

    def record(self, x: Tensor, escapes: list[Any], dtype: torch.dtype | None = None) -> None:
        """Note what a step gave."""
        index = len(self.escapes)
        self.escapes.append(escapes)
        if index in self.wanted or index in self.chain.taps:
            self.states[index] = x if dtype is None else x.to(dtype)

    def handed_out(self) -> list[Any]:
        """The taps, then the escapes."""
        taps = [self.states[index] for index in self.chain.taps]
        return [*taps, *(value for escapes in self.escapes for value in escapes)]

    def _value(self, side: State | Escape) -> Any:
        return self.states[side.step] if isinstance(side, State) else self.escapes[side.step][side.number]
