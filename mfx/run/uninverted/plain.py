"""Plain: a chain at gamma = 0, where there is nothing to invert.

Each step is ``x' = x + F(x)`` of the model itself (M1), under autograd, with a branch that is recomputed as a segment
(:mod:`mfx.run.uninverted.segment`): what is kept is x, once for steps that run together
(:mod:`mfx.run.uninverted.together`), and what hands out values, or looks at them, does so in the model's own graph.

Known limits: chains whose running statistics are inputs of the graph, or whose state is carried in another dtype than
the model's, run as reversible ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.rule.arithmetic.snapshots import Schedule
from mfx.rule.step import advance
from mfx.run.chain import ChainSpec, Inner
from mfx.run.tape import is_observed
from mfx.run.uninverted.segment import recomputed
from mfx.run.uninverted.together import together


def is_plain(chain: ChainSpec, plan: Schedule, x: Tensor) -> bool:
    """Whether ``chain`` can run from x as the model itself does."""
    apart = any(step.statistics or step.compiled for step in chain.steps)
    alike = all(step.rule.plain for step in chain.steps) and not apart and plan.state_dtype == x.dtype
    return alike and not is_observed()


def plain(chain: ChainSpec, plan: Schedule, root: nn.Module, x: Tensor, operands: Sequence[Sequence[Any]]) -> list[Any]:
    """x_N, the taps, and the escapes of each step in order, as :func:`mfx.run.reversible.run` gives them."""
    chain.drift.poll()
    chain, operands = together(chain, operands)
    inner = Inner(chain)
    for index, (step, given) in enumerate(zip(chain.steps, operands, strict=True)):
        sides = inner.sides(index, given)
        if index in chain.kept:
            value, *extra = step.branch(root, x, *sides)
        else:
            value, *extra = recomputed(step, root, x, *sides, told=_Told(chain, plan, index))
        dtype = step.result_dtype(x.dtype, value.dtype)
        x = advance(step, x, None, value)[0].to(dtype)
        inner.record(x, extra)
        del value
        if index + 1 in chain.ends:
            inner.read_out(x, None)
    return inner.handed_out()


@dataclass(frozen=True, eq=False)
class _Told:
    """Takes how far a branch was from itself when it ran again."""

    chain: ChainSpec
    plan: Schedule
    index: int

    def __call__(self, off: Tensor, dtype: torch.dtype) -> None:
        self.chain.drift.record(off, self.chain.name, self.plan.tolerance, self.index)
