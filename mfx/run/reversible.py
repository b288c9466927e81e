"""Run a chain: without storing activations where gradients are wanted, plainly elsewhere.

1. A chain runs in *segments*: one ends at each tap (a state that is handed out), and one with the chain.
   :class:`mfx.run.closing.Close` ends a segment.  Every value that leaves the segment leaves through it, and it alone
   saves the end state and the snapshots, so every backward starts there, with a :class:`mfx.run.closing.Rewind`.
2. The next segment starts from what was handed out, so a tap is in the graph, not beside it: its own gradient, and
   what a hook on it returns, are those of plain autograd.  The state is kept there
   (:mod:`mfx.rule.arithmetic.snapshots`): x is alive anyway, and v costs one state, or nothing where the step before
   starts from a kept state as well.
3. Each ``Step`` takes (x', v') of it, steps back to x (or takes x from a snapshot), runs its branch once more under the
   conditions of the first run (:mod:`mfx.run.recompute`), differentiates it, and leaves (x, v).  Its gradients leave at
   once, so the last block's come first (M10).

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.2.
Known limits: first derivatives only; double backward raises (M8).  Under ``torch.func`` transforms and
forward-mode differentiation the recurrence runs with stored activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError
from mfx.rule.arithmetic.carry import carry
from mfx.rule.arithmetic.snapshots import Schedule
from mfx.rule.step import added, check_velocity, passed_on, pulled
from mfx.rule.varying import Varies, by_values, gammas_of, varied
from mfx.run.beside import joined
from mfx.run.chain import ChainSpec, Inner, schedule_of, stored
from mfx.run.closing import Close, Turn, out_of_turn, refuse_double_backward
from mfx.run.conditions import Autocast, compiling, is_symbolic
from mfx.run.operands import Parameters, refuse_containers, refuse_lazy, without_graph
from mfx.run.recompute import Rerun, as_inner, as_recomputed, saved_tensors
from mfx.run.tape import Recorder, Setting, Slot, newest_observer
from mfx.run.uninverted.kept import kept_step
from mfx.run.uninverted.plain import is_plain, plain
from mfx.run.watched import refuse_watched
from mfx.run.watching import Followed
from mfx.sharding import ANCHOR
from mfx.torch_versions import (
    forward_derivative_is_on,
    functions_are_transformed,
    is_recording,
    keeping_version,
    not_followed,
    will_run,
)


def run(
    chain: ChainSpec,
    root: nn.Module,
    x: Tensor,
    velocity: Tensor | None,
    *operands: Sequence[Any],
    gammas: Tensor | None = None,
) -> tuple[Any, ...]:
    """Run ``chain`` from (x_0, v_0); gives x_N, the taps, and the escapes of each step in order.

    ``gammas`` are those of the steps whose gamma varies (:mod:`mfx.rule.varying`).
    """
    check_velocity(chain.name, x, velocity)
    chain = _with_gammas(chain, gammas, x)
    plan = schedule_of(chain, root, x)
    if chain.reversible and _wants_gradient(x, velocity, (*operands, gammas_of(chain.steps))):
        refuse_lazy(chain.steps, operands)
        if is_plain(chain, plan, x):
            return _copies(chain, plain(chain, plan, root, x, operands))
        return _reversible(chain, plan, root, x, velocity, operands)
    state = x.to(plan.state_dtype)
    velocity = None if velocity is None else velocity.to(plan.state_dtype)
    return stored(chain, carry(chain.steps, plan), root, state, velocity, operands, x.dtype)


def _with_gammas(chain: ChainSpec, gammas: Tensor | None, x: Tensor) -> ChainSpec:
    """The chain by the ``gammas`` of this call; as it is planned where there are no values."""
    if not any(isinstance(step.rule, Varies) for step in chain.steps) or is_symbolic(x):
        return chain
    steps = varied(chain.name, chain.steps, gammas, x, known=not (is_recording() or compiling(x)))
    learned = any(gamma is not None and gamma.requires_grad for gamma in gammas_of(steps))
    planned = partial(chain.schedule, rules=tuple(step.rule.planned for step in steps), velocities=learned)
    return replace(chain, steps=steps, schedule=planned)


def _wants_gradient(x: Tensor, velocity: Tensor | None, operands: Sequence[Sequence[Any]]) -> bool:
    """Whether there is something to differentiate, in the one way the reversible run can (M8, M9)."""
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    # What becomes a graph, forward and backward, says itself what is kept in between.
    if is_recording() or compiling(x):
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
) -> tuple[Any, ...]:
    """One autograd node a block, and one that closes the chain."""
    chain.drift.poll()
    gammas = gammas_of(chain.steps)
    setting = _setting(replace(chain, steps=by_values(chain.steps)), plan, root, x)
    states = [(x.detach().to(plan.state_dtype), None if v is None else v.detach().to(plan.state_dtype))]
    inner, dtype, start, begin = Inner(chain), x.dtype, states[0][1], 0
    for end in chain.ends:
        recorder, slot, nodes = Recorder(dtype, begin, states.pop(), inner.wanted), Slot(), []
        for index in range(begin, end):
            if index in chain.kept:
                beside = bool(slot.beside or inner.escaped(begin))
                sides = inner.sides(index, operands[index])
                x, v, extra = kept_step(setting, recorder, slot, index, x, v, sides, beside)
                recorder.escapes = len(extra)
            else:
                parameters = Parameters.of(chain.steps[index], root)
                given = (*inner.sides(index, operands[index]), *parameters.tensors)
                anchor = None if parameters.units is None else parameters.units.anchor
                state = (x, v, gammas[index], anchor)
                x, v, *extra = Step.apply(setting, recorder, slot, parameters, index, *state, *given)  # type: ignore[misc]
            nodes.append(x.grad_fn)
            inner.record(x if index in inner.wanted else None, extra[: recorder.escapes], recorder.dtype)
            slot.note(index, recorder.escapes, extra[recorder.escapes :])
            del extra
        x, v = _closed(setting, recorder, slot, inner, nodes, start if begin == 0 else None, x, v)
        states.append(recorder.state)
        dtype, begin = recorder.dtype, end
    return _copies(chain, inner.handed_out())


def _closed(
    setting: Setting,
    recorder: Recorder,
    slot: Slot,
    inner: Inner,
    nodes: list[Any],
    start: Tensor | None,
    x: Tensor,
    v: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """End a segment: the state after it, as its readers are to have it."""
    begin = recorder.first
    keys = [(begin + n, number) for n, group in enumerate(inner.escapes[begin:]) for number in range(len(group))]
    kept = slot.taken()
    held = tuple(kept.values())
    with keeping_version(held):
        out, v, *values = Close.apply(  # type: ignore[misc]
            setting, recorder, slot, start, x, v, len(held), *inner.escaped(begin), *held
        )
    if not setting.symbolic:
        out, v, *values = joined(slot, begin, nodes, (out, v), [*keys, *kept], values, len(held))
    inner.close(out, values, begin)
    inner.read_out(out, v, apart=True)
    return out, v


def _setting(chain: ChainSpec, plan: Schedule, root: nn.Module, x: Tensor) -> Setting:
    """What all steps of the forward that starts from x have in common."""
    return Setting(
        chain,
        plan,
        root,
        autocast=Autocast.current(x.device),
        carry=carry(chain.steps, plan, chain.kernels),
        symbolic=is_symbolic(x),
        observer=newest_observer(chain.name, plan),
    )


class Step(torch.autograd.Function):
    """``(x, v, anchor, operands) -> (x', v', escapes, watched values)``; saves its operands only.

    The anchor stands for parameters that are sharded (:mod:`mfx.sharding`), if there are any.

    The state itself is in the recorder, which nobody else sees, so that it lives no longer than it must.  What autograd
    is given for it has no values and takes no memory; it is what the gradients go by, in a dtype that may be
    coarser than the state's: they are not carried further than those of the plain model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        setting: Setting,
        recorder: Recorder,
        slot: Slot,
        parameters: Parameters,
        index: int,
        edge_x: Tensor,
        edge_v: Tensor | None,
        gamma: Tensor | None,
        anchor: Tensor | None,
        *given: Any,
    ) -> Any:
        step = setting.chain.steps[index]
        ctx.set_materialize_grads(False)
        to_save = [isinstance(operand, Tensor) and i not in step.statistics for i, operand in enumerate(given)]
        ctx.save_for_backward(*compress(given, to_save))
        begin, _ = recorder.state
        x = recorder.enter(setting, index)
        ctx.slot, ctx.rerun = slot, Rerun.of(setting, index, recorder.dtype, x, parameters, given, to_save)
        known = edge_x if index == recorder.first and x is begin and edge_x.dtype == recorder.dtype else None
        del begin
        value, *extra = _first_run(ctx.rerun, x, given, to_save, known, ctx.needs_input_grad[5])
        del x
        recorder.escapes = len(extra)
        state = recorder.advance(setting, index, value, any(ctx.needs_input_grad))
        return (*state, *extra, *ctx.rerun.watch.taken(given))

    @staticmethod
    @not_followed
    def backward(ctx: Any, *grads_out: Tensor | None) -> Any:
        grad_x, grad_v, *grad_extra = grads_out
        rerun: Rerun = ctx.rerun
        setting, index, step = rerun.setting, rerun.index, rerun.step
        refuse_double_backward(setting.chain)
        if ctx.slot.rewind is None:
            raise out_of_turn(setting.chain, index)
        operands = rerun.operands(iter(saved_tensors(ctx, f"a parameter or side input of block {step.name!r}")))
        total = added(grad_v, grad_x) if ctx.needs_input_grad[7] else None
        value = pulled(step, grad_x, grad_v, own=total is None)
        turn = Turn(ctx.slot.rewind, index, total)
        refuse_watched(step.name, ctx.slot.of_step(index) if value is not None else ())
        grads: list[Tensor | None] = [None] * (1 + len(operands))
        if turn.divides or value is not None or any(grad is not None for grad in grad_extra):
            wanted = (ctx.needs_input_grad[5], *ctx.needs_input_grad[9:])
            accumulate = ctx.needs_input_grad[8] and will_run(ANCHOR)
            grads = rerun.differentiate(turn, operands, wanted, value, grad_extra, accumulate)
        else:
            turn.pass_on(None)
        if index == ctx.slot.rewind.left.first:
            ctx.slot.rewind = None
        own_x, own_v = passed_on(step, grad_x, grad_v, value)
        own_v = own_v if ctx.needs_input_grad[6] else None
        of_state = (added(own_x, grads[0]), own_v, turn.of_gamma, None)
        return None, None, None, None, None, *of_state, *grads[1:]


def _first_run(
    rerun: Rerun, x: Tensor, operands: Sequence[Any], saved: Sequence[bool], known: Tensor | None, wanted: bool
) -> list[Any]:
    """The values of a step's branch, without history; ``known`` is x with its history, where that is there.

    ``wanted`` says whether the recomputation will be asked for a gradient of x.
    """
    setting, step, index = rerun.setting, rerun.step, rerun.index
    sides = operands[: len(step.sides)]
    refuse_containers(step, [side for side in sides if not isinstance(side, Tensor)], "takes")
    seen = [x, *compress(sides, saved)]
    versions = [] if setting.symbolic else [tensor._version for tensor in seen]
    first = bool(rerun.watch.keeping) and index not in setting.chain.followed
    followed = Followed([x, *operands]) if first else None
    once = (rerun.conditions.recorded(), rerun.watch.first())
    with setting.autocast(), once[0], once[1], as_recomputed(step):
        # A view, as in the recomputation: hooks that keep it get no leaf.
        alike = step.sees_grad_mode or step.compiled
        inner = as_inner(x.detach().requires_grad_(wanted or not step.compiled)) if alike else x
        entry = inner.to(rerun.dtype)
        if followed is not None:
            followed.known[entry] = False
        rerun.watch.enters(entry, known, operands)
        with followed or contextlib.nullcontext():
            values = step.branch(setting.root, entry, *sides)
    if versions and [tensor._version for tensor in seen] != versions:
        raise BackwardError(
            f"block {step.name!r}: its branch writes in place to x or to a value from outside it, so it cannot "
            f"be recomputed. Write to a copy (.clone()), or keep the block as it is with exclude={step.name!r}"
        )
    values = [without_graph(step, value) for value in values]
    if followed and not followed.lose(f"a module of block {step.name!r}", [*values, *rerun.watch.found.values()]):
        setting.chain.followed.add(index)
    return values


def _copies(chain: ChainSpec, values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(v.clone() if n in chain.copied and isinstance(v, Tensor) else v for n, v in enumerate(values))
