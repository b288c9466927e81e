"""Step: one block of a chain, as far as running it needs, and what its rule makes of it.

A step has a branch (``f`` of a residual block ``x + scale * f(x)``, or ``G`` of a wrapped block, ``F(x) = G(x) - x``)
and a :class:`mfx.rule.base.Rule`.  Here dtypes, scales and the two kinds of block are seen to, so that a rule knows
tensors and its two numbers alone.  A plain step computes what the model computes, exactly (M1).
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfx.errors import ShapeError
from mfx.rule.base import Rule


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
    moves no running statistics, which are the sides numbered in ``statistics``.  ``modules`` are called whole by the
    branch, ``buffers`` read by it; ``draws`` says whether it may draw random numbers, ``sees_grad_mode`` whether it may
    compute otherwise without gradient (fast paths of attention), ``compiled`` that it is, and so does.  ``written`` is
    the operand ("skip" or "branch") that an in-place add of the original wrote into, whose dtype the result has;
    ``branch_first`` says whether its add takes the branch first, which may decide the memory format of the sum, and so
    what later dropout draws; ``escapes`` how many values from inside are handed out.  Of a segment whose inputs wait on
    the host, ``offloaded`` is its number among those.

    Where the branch may yet be compiled, ``graph`` is what it is made of, ``moved`` the running statistics in it; the
    block is in the module ``home``.
    """

    name: str
    branch: Callable[..., tuple[Any, ...]]
    again: Callable[..., tuple[Any, ...]]
    rule: Rule
    wrapped: bool
    scale: float
    written: str
    sides: tuple[State | Escape | None, ...]
    parameters: tuple[tuple[tuple[str, str], ...], ...]
    modules: tuple[str, ...]
    buffers: tuple[tuple[str, str], ...]
    statistics: tuple[int, ...]
    draws: bool
    sees_grad_mode: bool
    branch_first: bool = False
    escapes: int = 0
    compiled: bool = False
    home: str = ""
    graph: Any = None
    moved: tuple[Any, ...] = ()
    offloaded: int | None = None

    def result_dtype(self, x: torch.dtype, value: torch.dtype) -> torch.dtype:
        """The dtype that the original's add gives."""
        if self.wrapped or self.written == "branch":
            return value
        return x if self.written == "skip" else torch.promote_types(x, value)


def tail_of(steps: int, kept: Set[int]) -> int:
    """The step from which on all of a chain's keep their activations."""
    return next((step + 1 for step in reversed(range(steps)) if step not in kept), 0)


def advance(step: StepSpec, x: Tensor, v: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
    """One step: (x, v) and the branch's value to (x', v').  ``v`` None stands for zero."""
    state = torch.promote_types(x.dtype, step.result_dtype(x.dtype, value.dtype))
    x, value = x.to(state), value.to(state)
    branch = branch_of(step, x, value)
    if not step.rule.plain:
        return step.rule.advance(x, v, branch)
    if step.wrapped:
        return value, branch
    return branch + x if step.branch_first else x + branch, branch


def retreat(step: StepSpec, x: Tensor, v: Tensor, value: Tensor) -> Tensor:
    """The velocity before a step, from x before it, v' after it and the branch's value at x."""
    return step.rule.retreat(v, branch_of(step, x, value.to(v.dtype)))


def pulled(step: StepSpec, grad_x: Tensor | None, grad_v: Tensor | None, own: bool = False) -> Tensor | None:
    """From the gradients of x' and v' that of the branch's value; ``own``: ``grad_v`` may be used up for it.

    It is all that has to be there, beside ``grad_x``, while the branch is differentiated: see :func:`passed_on`.
    """
    factor = _like(step.rule.pull * step.scale, grad_x, grad_v)
    if grad_x is None or grad_v is None or not own or _is(factor, 0):
        total = added(grad_v, grad_x)
        return total if total is None or _is(factor, 1) else total * factor
    return grad_v.add_(grad_x).mul_(factor)


def passed_on(
    step: StepSpec, grad_x: Tensor | None, grad_v: Tensor | None, value: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x (but for what comes through the branch) and v; ``value`` is what :func:`pulled` gave.

    Where the factor of the branch is not 0, ``grad_v`` may be used up: that of v follows from that of the value.
    """
    factor, decay = (_like(one, value) for one in (step.rule.pull * step.scale, step.rule.decay))
    if value is None:
        return grad_x, None
    velocity = None
    if not _is(decay, 0):
        total = added(grad_v, grad_x) if _is(factor, 0) else None
        velocity = value * (decay / factor) if total is None else total * decay
    if not step.wrapped:
        return grad_x, velocity
    # F = G - x gives x another -pull; in a plain step that takes away what x' = x + F gave it.
    whole = step.rule.plain and grad_v is None
    return (None if whole else -value if grad_x is None else grad_x - value), velocity


def cotangents(
    step: StepSpec, grad_x: Tensor | None, grad_v: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradients of x' and v' those of x (but for what comes through the branch), v and the branch's value."""
    value = pulled(step, grad_x, grad_v)
    return *passed_on(step, grad_x, grad_v, value), value


def _is(number: float | Tensor, value: int) -> bool:
    """Whether one of a rule's numbers is known to be this one."""
    return not isinstance(number, Tensor) and number == value


def _like(number: float | Tensor, *tensors: Tensor | None) -> float | Tensor:
    """One of a rule's numbers in the dtype of the first tensor that is there."""
    dtype = next((tensor.dtype for tensor in tensors if tensor is not None), None)
    return number.to(dtype) if isinstance(number, Tensor) and dtype is not None else number


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None is zero."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def check_velocity(chain: str, x: Tensor, v: Tensor | None) -> None:
    """A velocity of another shape would broadcast."""
    if v is not None and v.shape != x.shape:
        raise ShapeError(
            f"{chain}: v_0 has shape {tuple(v.shape)}, but x has shape {tuple(x.shape)}. What gives the velocity "
            "(init_function, velocity=) has to keep the shape of x"
        )


def branch_of(step: StepSpec, x: Tensor, value: Tensor) -> Tensor:
    """F(x) from the branch's value."""
    if value.shape != x.shape:
        raise ShapeError(
            f"block {step.name!r}: its branch returned shape {tuple(value.shape)}, but x has shape "
            f"{tuple(x.shape)}. Pass example_inputs= so that shapes are known when planning, or keep the block "
            f"as it is with exclude={step.name!r}"
        )
    if step.wrapped:
        return value - x
    return value if step.scale == 1.0 else value * step.scale
