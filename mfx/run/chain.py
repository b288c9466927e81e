"""Chain: what is run, and the plain run of it, in which autograd stores what it needs.

:class:`Inner` keeps, in either run, the values of a chain that later steps of it, or others, read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mfx.rule.carry import Floating
from mfx.rule.snapshots import Schedule
from mfx.rule.step import Escape, State, StepSpec
from mfx.run.detector import Drift


@dataclass(frozen=True, eq=False)
class ChainSpec:
    """A chain, as far as running it needs.

    ``taps`` are the steps whose result is handed out as well; ``copied`` the positions among all values handed
    out that somebody outside will write to in place, and that are therefore handed out as copies.
    ``schedule(dtype, compute, same_branches)`` is that of :func:`mfx.rule.snapshots.schedule`;
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


def stored(
    chain: ChainSpec,
    carry: Floating,
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
