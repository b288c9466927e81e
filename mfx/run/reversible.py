"""Run a chain: without storing activations where gradients are wanted, plainly elsewhere.

1. A chain runs in *segments*: one ends at each tap (a state that is handed out), and one with the chain.
   :class:`mfx.run.closing.Close` ends a segment.  Every value that leaves the segment leaves through it, and it alone
   saves the end state and the snapshots, so every backward starts there, with a :class:`mfx.run.tape.Rewind`.
2. The next segment starts from what was handed out, so a tap is in the graph, not beside it: its own gradient, and
   what a hook on it returns, are those of plain autograd.  The state is kept there (:mod:`mfx.rule.snapshots`): x is
   alive anyway, and v costs one state, or nothing where the step before starts from a kept state as well.
3. Each ``Step`` takes (x', v') of it, steps back to x (or takes x from a snapshot), runs its branch once more under the
   conditions of the first run (:mod:`mfx.run.recompute`), differentiates it, and leaves (x, v).  Its gradients leave at
   once, so the last block's come first (M10).
4. A compiler that sees forward and backward compute the same from one snapshot would do so once, and keep all of it in
   between.  So it is given the snapshot as a *twin*, with some bits turned, which backward turns back.

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.2.
Known limits: first derivatives only; double backward raises (M8).  Under ``torch.func`` transforms and
forward-mode differentiation the recurrence runs with stored activations.  A branch value that is handed out (attention
weights) is beside the rest of its branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mfx.errors import BackwardError, InputTypeError
from mfx.rule.carry import carry
from mfx.rule.snapshots import Schedule
from mfx.rule.step import StepSpec, added, check_velocity, cotangents
from mfx.run.chain import ChainSpec, Inner, continued, stored
from mfx.run.closing import Close, refuse_double_backward
from mfx.run.conditions import Autocast, autocast_dtype, compiling, is_symbolic
from mfx.run.operands import Parameters
from mfx.run.recompute import Rerun, as_recomputed, saved_tensors
from mfx.run.seeded import Seed
from mfx.run.tape import Recorder, Setting, Slot, newest_observer, out_of_turn
from mfx.run.watched import refuse_watched
from mfx.torch_versions import forward_derivative_is_on, functions_are_transformed, has_float64, keeping_version, pytree


def run(
    chain: ChainSpec,
    root: nn.Module,
    x: Tensor,
    velocity: Tensor | None,
    *operands: Sequence[Any],
    seed: Tensor | None = None,
) -> tuple[Any, ...]:
    """Run ``chain`` from (x_0, v_0); gives x_N, the taps, and the escapes of each step in order.

    While a compiler traces, random operations draw from ``seed`` (:mod:`mfx.run.seeded.random`).
    """
    check_velocity(chain.name, x, velocity)
    plan = _schedule(chain, x)
    state = x.to(plan.state_dtype)
    velocity = None if velocity is None else velocity.to(plan.state_dtype)
    if chain.reversible and _wants_gradient(x, velocity, operands):
        return _reversible(chain, plan, root, state, velocity, operands, x.dtype, seed)
    return stored(chain, carry(chain.steps, plan), root, state, velocity, operands, x.dtype)


def _schedule(chain: ChainSpec, x: Tensor) -> Schedule:
    """The plan for an input such as ``x``, under the autocast in force."""
    if x.is_complex():
        raise InputTypeError(
            f"{chain.name}: its input is complex ({x.dtype}), and the momentum recurrence is defined here for real "
            f"numbers. Keep its blocks as they are with exclude={chain.steps[0].name!r} ..., or split the values into "
            "real and imaginary part (torch.view_as_real)"
        )
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    how = (autocast_dtype(x.device, dtype), not compiling(x))
    return chain.schedule(dtype, *how, float64=has_float64(x.device))


def _wants_gradient(x: Tensor, velocity: Tensor | None, operands: Sequence[Sequence[Any]]) -> bool:
    """Whether there is something to differentiate, in the one way the reversible run can (M8, M9)."""
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if functions_are_transformed() or forward_derivative_is_on():
        return False
    tensors = [x, velocity, *(operand for group in operands for operand in group)]
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _reversible(
    chain: ChainSpec,
    plan: Schedule,
    root: nn.Module,
    x: Tensor,
    v: Tensor | None,
    operands: Sequence[Sequence[Any]],
    dtype: torch.dtype,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """One autograd node a block, and one that closes the chain."""
    _refuse_lazy(chain, operands)
    chain.drift.poll()
    setting = _setting(chain, plan, root, x, seed)
    inner, out, start, begin = Inner(chain), x, v, 0
    for end in chain.ends:
        recorder, slot = Recorder(dtype, begin), Slot()
        for index in range(begin, end):
            parameters = Parameters.of(chain.steps[index], root)
            given = (*inner.sides(index, operands[index]), *parameters.tensors)
            x, v, *extra = Step.apply(setting, recorder, slot, parameters, index, x, v, *given)  # type: ignore[misc]
            inner.record(x, extra[: recorder.escapes], recorder.dtype)
            slot.note(index, extra[recorder.escapes :])
            del extra
        held = [value for value in slot.held() if value.requires_grad and not value._is_view()]
        values = (start if begin == 0 else None, x, v, len(held), *inner.escaped(begin), *held)
        with keeping_version(tuple(held)):
            out, v, *escapes = Close.apply(setting, recorder, slot, *values)  # type: ignore[misc]
        del held, values
        inner.close(out, escapes, begin)
        for index in range(begin, end):
            slot.note(index, inner.escapes[index])
        x, dtype, begin = continued(out, x), recorder.dtype, end
    return tuple(_copied(value, index in chain.copied) for index, value in enumerate(inner.handed_out(out)))


def _setting(chain: ChainSpec, plan: Schedule, root: nn.Module, x: Tensor, seed: Tensor | None) -> Setting:
    """What all steps of the forward that starts from x have in common."""
    drawn = None if seed is None else Seed(seed)
    return Setting(
        chain,
        plan,
        root,
        autocast=Autocast.current(x.device),
        carry=carry(chain.steps, plan),
        symbolic=is_symbolic(x),
        seed=drawn,
        twin=None if drawn is None else drawn.twin(),
        observer=newest_observer(chain.name, plan),
    )


class Step(torch.autograd.Function):
    """``(x, v, operands) -> (x', v', escapes, watched values)``; saves its operands only."""

    @staticmethod
    def forward(
        ctx: Any,
        setting: Setting,
        recorder: Recorder,
        slot: Slot,
        parameters: Parameters,
        index: int,
        x: Tensor,
        v: Tensor | None,
        *given: Any,
    ) -> Any:
        step = setting.chain.steps[index]
        ctx.set_materialize_grads(False)
        to_save = [isinstance(operand, Tensor) and i not in step.statistics for i, operand in enumerate(given)]
        ctx.save_for_backward(*compress(given, to_save))
        if index in setting.plan.snapshots:
            recorder.snapshots[index] = (x, v if setting.plan.keeps_velocity(index) else None)
        x, v = setting.carry.enter(index, x, v)
        setting.observe(0, x, v) if index == 0 else None
        recorder.note_zeros(setting, x)
        strides = x.stride()
        ctx.slot, ctx.rerun = slot, Rerun.of(setting, index, recorder.dtype, x, parameters, given, to_save)
        value, *extra = _first_run(ctx.rerun, x, given, to_save)
        recorder.escapes = len(extra)
        recorder.record(strides, any(ctx.needs_input_grad), step.result_dtype(recorder.dtype, value.dtype))
        x, v = setting.carry.advance(index, x, v, value)
        setting.observe(index + 1, x, v)
        return (x, v, *extra, *ctx.rerun.watch.taken(given))

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor | None) -> Any:
        grad_x, grad_v, *grad_extra = grads_out
        rerun: Rerun = ctx.rerun
        setting, index, step = rerun.setting, rerun.index, rerun.step
        refuse_double_backward(setting.chain)
        rewind = ctx.slot.rewind
        if rewind is None:
            raise out_of_turn(setting.chain, index)
        x, v, after = rewind.before(index)
        inside, known = setting.carry.enter(index, x, v)
        operands = rerun.operands(iter(saved_tensors(ctx, f"a parameter or side input of block {step.name!r}")))
        own_x, own_v, pulled = cotangents(step, grad_x, grad_v)
        refuse_watched(step.name, ctx.slot.beside.get(index, ()) if pulled is not None else ())
        kept = index in setting.plan.snapshots
        divides = not kept and step.rule.decay != 0 and (index > 0 or setting.observer is not None)
        value, grads = None, [None] * (1 + len(operands))
        if divides or pulled is not None or any(grad is not None for grad in grad_extra):
            wanted = (ctx.needs_input_grad[5], *ctx.needs_input_grad[7:])
            value, grads = rerun.differentiate(inside, operands, wanted, pulled, grad_extra)
        if value is not None and (index == 0 or kept):
            rewind.check(index, inside, known, after, value)
        if divides and value is not None:
            assert after is not None and after[1] is not None
            v = setting.carry.v_before(index, inside, after[1], value)
        setting.observe(index, inside, v)
        if rewind.leave(index, x, v):
            ctx.slot.rewind = None
        own_v = own_v if ctx.needs_input_grad[6] else None
        return None, None, None, None, None, added(own_x, grads[0]), own_v, *grads[1:]


def _first_run(rerun: Rerun, x: Tensor, operands: Sequence[Any], saved: Sequence[bool]) -> list[Any]:
    """The values of a step's branch, without history."""
    setting, step, index = rerun.setting, rerun.step, rerun.index
    sides = operands[: len(step.sides)]
    _refuse_containers(step, [side for side in sides if not isinstance(side, Tensor)], "takes")
    seen = [x, *compress(sides, saved)]
    versions = [] if setting.symbolic else [tensor._version for tensor in seen]
    once = (rerun.conditions.recorded(), rerun.watch.first())
    with setting.autocast(), once[0], once[1], as_recomputed(step), setting.draws(index, again=False):
        # A view, as in the recomputation: hooks that keep it get no leaf.
        inner = x.detach().requires_grad_().view_as(x) if step.sees_grad_mode else x
        values = step.branch(setting.root, inner.to(rerun.dtype), *sides)
    if versions and [tensor._version for tensor in seen] != versions:
        raise BackwardError(
            f"block {step.name!r}: its branch writes in place to x or to a value from outside it, so it cannot "
            f"be recomputed. Write to a copy (.clone()), or keep the block as it is with exclude={step.name!r}"
        )
    return [_tensor_or_plain(step, value) for value in values]


def _copied(value: Any, wanted: bool) -> Any:
    return value.clone() if wanted and isinstance(value, Tensor) else value


def _tensor_or_plain(step: StepSpec, out: Any) -> Any:
    """A branch's value without its gradient graph."""
    if isinstance(out, Tensor):
        return out.detach()
    _refuse_containers(step, [out], "hands out")
    return out


def _refuse_containers(step: StepSpec, values: list[Any], what: str) -> None:
    """Autograd sees tensors only: those inside anything else would lose their gradient unseen."""
    for value in values:
        leaves = pytree.tree_leaves(value) if isinstance(value, (tuple, list, dict)) else ()
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            raise BackwardError(
                f"block {step.name!r}: its branch {what} tensors inside a {type(value).__name__}, and their gradients "
                f"would be lost. Pass them on one by one, or keep the block as it is with exclude={step.name!r}"
            )


def _refuse_lazy(chain: ChainSpec, operands: Sequence[Sequence[Any]]) -> None:
    for step, group in zip(chain.steps, operands, strict=True):
        if any(is_lazy(operand) for operand in group):
            raise InputTypeError(
                f"block {step.name!r} has a lazy module whose parameters have no shape yet: run the model once without "
                "gradients (torch.no_grad()) first"
            )
