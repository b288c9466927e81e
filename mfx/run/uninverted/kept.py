"""Kept: a step whose branch keeps its activations, within a chain that is run backwards.

1. The branch runs under autograd, from x as the step before left it.
2. The step takes its value as one more input, and saves it: that is all that running the recurrence backwards needs.
3. In backward the step undoes itself for those before it, and gives autograd the cotangents of x, v and the value; the
   branch is differentiated as in the plain model.
4. Who goes through the segment ahead of backward (:mod:`mfx.run.beside`) finds the branch as it is.  Its inputs are
   views of their own there, so that it can be differentiated by them alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfx.rule.step import StepSpec, cotangents
from mfx.run.chain import Continue
from mfx.run.closing import Turn, out_of_turn, refuse_double_backward
from mfx.run.recompute import Opened, as_inner, saved_tensors
from mfx.run.tape import Recorder, Setting, Slot
from mfx.torch_versions import not_followed


def kept_step(
    setting: Setting,
    recorder: Recorder,
    slot: Slot,
    index: int,
    x: Tensor,
    v: Tensor | None,
    sides: Sequence[Any],
    beside: bool,
) -> tuple[Tensor, Tensor, list[Any]]:
    """(x', v') after a step, as autograd is given them, and the other values of its branch.

    ``beside`` says that values from inside earlier steps of the segment are handed out.
    """
    dtype = recorder.dtype
    inside: Tensor = Continue.apply(x, recorder.enter(setting, index).to(dtype))  # type: ignore[assignment]
    leaves = [inside, *map(as_inner, sides)]
    value, *extra = setting.chain.steps[index].branch(setting.root, *leaves)
    alive = Alive(setting, index, dtype, Opened(leaves, inside, [value, *extra]) if beside or extra else None)
    return *Kept.apply(recorder, slot, alive, x, v, value), extra  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Alive:
    """A kept step in the place of a :class:`mfx.run.recompute.Rerun`."""

    setting: Setting
    index: int
    dtype: torch.dtype
    graph: Opened | None

    @property
    def step(self) -> StepSpec:
        """The step itself."""
        return self.setting.chain.steps[self.index]

    def operands(self, saved: Iterator[Tensor]) -> tuple[Any, ...]:
        """None are needed."""
        return ()

    def opened(self, x: Tensor, operands: Sequence[Any]) -> Opened:
        """The branch with its graph."""
        assert self.graph is not None
        return self.graph


class Kept(torch.autograd.Function):
    """``(x, v, value) -> (x', v')``; saves the value."""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        slot: Slot,
        alive: Alive,
        edge_x: Tensor,
        edge_v: Tensor | None,
        value: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.slot, ctx.rerun = slot, alive
        ctx.save_for_backward(value)
        return recorder.advance(alive.setting, alive.index, value.detach(), any(ctx.needs_input_grad))

    @staticmethod
    @not_followed
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        setting, index = ctx.rerun.setting, ctx.rerun.index
        refuse_double_backward(setting.chain)
        rewind = ctx.slot.rewind
        if rewind is None:
            raise out_of_turn(setting.chain, index)
        (value,) = saved_tensors(ctx, f"the value of block {setting.chain.steps[index].name!r}")
        Turn(rewind, index).pass_on(value)
        if index == rewind.left.first:
            ctx.slot.rewind = None
        own_x, own_v, pulled = cotangents(setting.chain.steps[index], *grads)
        return None, None, None, own_x, own_v if ctx.needs_input_grad[4] else None, pulled
