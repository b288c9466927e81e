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
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError
from mfx.rule.arithmetic.carry import carry
from mfx.rule.step import added, check_velocity, passed_on, pulled
from mfx.rule.varying import by_values, gammas_of
from mfx.run.beside import joined
from mfx.run.chain import ChainSpec, Inner, continued, copies, schedule_of, wants_gradient, with_gammas
from mfx.run.closing import Close, Turn, out_of_turn, refuse_double_backward
from mfx.run.conditions import Autocast, is_symbolic
from mfx.run.linked import Start, joint_of
from mfx.run.linked.undo import Held, Undo
from mfx.run.operands import Parameters, refuse_containers, refuse_lazy, without_graph
from mfx.run.recompute import Rerun, as_inner, as_recomputed, saved_tensors
from mfx.run.tape import Recorder, Setting, Slot, newest_observer
from mfx.run.uninverted.kept import kept_step
from mfx.run.uninverted.plain import is_plain, plain
from mfx.run.uninverted.stored import stored, stored_tail
from mfx.run.watched import refuse_watched
from mfx.run.watching import Followed
from mfx.sharding import ANCHOR
from mfx.torch_versions import (
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
    chain = with_gammas(chain, gammas, x)
    joint = joint_of(chain)
    before = None if joint is None else joint.before(chain, x)
    by = velocity if before is None else before.gradient_goes_by
    reversible = chain.reversible and chain.tail > 0 and wants_gradient(x, by, (*operands, gammas_of(chain.steps)))
    if joint is None:
        start = Start(schedule_of(chain, root, x), velocity)
    else:
        start = joint.start(chain, before, reversible, schedule_of(chain, root, x, rules=joint.rules(), cut=False))
    if not reversible:
        return _stored(chain, start, root, x, operands)
    refuse_lazy(chain.steps, operands)
    if joint is None and is_plain(chain, start.plan, x):
        return copies(chain, plain(chain, start.plan, root, x, operands))
    return _reversible(chain, start, root, x, operands)


def _stored(
    chain: ChainSpec, start: Start, root: nn.Module, x: Tensor, operands: Sequence[Sequence[Any]]
) -> tuple[Any, ...]:
    """The plain recurrence from its start."""
    plan, before = start.plan, start.before
    how, v = carry(chain.steps[: chain.tail], plan), start.velocity
    state = (x.to(plan.state_dtype), None if v is None else v.to(plan.state_dtype))
    if before is not None:
        how.go_on(before.carry)
        state = (continued(x, before.state[0].detach()), before.state[1])
    values, *end = stored(chain, how, root, *state, operands, x.dtype)
    start.end(chain, values[0], state=tuple(end), carry=how)
    return tuple(values)


def _reversible(
    chain: ChainSpec, start: Start, root: nn.Module, x: Tensor, operands: Sequence[Sequence[Any]]
) -> tuple[Any, ...]:
    """One autograd node a block, and one that closes the chain."""
    chain.drift.poll()
    gammas, valued = gammas_of(chain.steps), replace(chain, steps=by_values(chain.steps))
    setting, before, v = _setting(valued, start, root, x), start.before, start.velocity
    finer = setting.plan.state_dtype
    states = [(x.detach().to(finer), None if v is None else v.detach().to(finer))]
    first = states[0][1]
    if before is not None:
        states, first, v = [before.state], None, before.edge
    inner, dtype, begin, left, tail = Inner(chain), x.dtype, 0, dict[str, Any](), chain.tail
    for end in (*(end for end in chain.ends if end < tail), tail):
        recorder, slot, nodes = Recorder(dtype, begin, states.pop(), inner.wanted), Slot(), []
        if begin == 0 and before is not None:
            recorder.go_on(before.handover, before.zeros, before.counted)
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
        x, v = _closed(setting, recorder, slot, inner, nodes, first if begin == 0 else None, x, v)
        states.append(recorder.state)
        dtype, begin, left = recorder.dtype, end, recorder.handed_over()
    if tail < len(chain.steps):
        stored_tail(inner, setting.carry, root, (x, v), states.pop(), operands, dtype)
        return copies(chain, inner.handed_out())
    start.end(chain, x, state=states[0], carry=setting.carry, edge=v, **left)
    return copies(chain, inner.handed_out())


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
    kept, snapshots = slot.taken(), recorder.snapshots
    held = tuple(kept.values())
    with keeping_version(held):
        out, v, *values = Close.apply(  # type: ignore[misc]
            setting, recorder, slot, start, x, v, len(held), *inner.escaped(begin), *held
        )
    if not setting.symbolic:
        out, v, *values = joined(slot, begin, nodes, (out, v), [*keys, *kept], values, len(held))
    inner.close(out, values, begin)
    inner.read_out(out, v, apart=True)
    if recorder.back is not None:
        assert recorder.left is not None
        again = {index: (Held(x), None if v is None else Held(v)) for index, (x, v) in snapshots.items()}
        recorder.back.take(Undo(replace(recorder.left, back=None), recorder.handover, again, recorder.ran))
    return out, v


def _setting(chain: ChainSpec, start: Start, root: nn.Module, x: Tensor) -> Setting:
    """What all steps of the forward that starts from x have in common."""
    plan, how = start.plan, carry(chain.steps[: chain.tail], start.plan, chain.kernels)
    if start.before is not None:
        how.go_on(start.before.carry)
    return Setting(
        chain,
        plan,
        root,
        autocast=Autocast.current(x.device),
        carry=how,
        symbolic=is_symbolic(x),
        observer=newest_observer(chain.name, plan),
        linked=start.joint is not None,
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
        if recorder.back is not None:
            recorder.ran.append((ctx.rerun, tuple(map(Held, compress(given, to_save)))))
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
    rerun.watch.uncompiled = (
        first  # what is followed Dynamo does not compile, and then draws otherwise than what is not
    )
    once = (rerun.conditions.recorded(), rerun.watch.first())
    with setting.autocast(), once[0], once[1], as_recomputed(step):
        # A view, as in the recomputation: hooks that keep it get no leaf.
        alike = step.sees_grad_mode or step.compiled
        inner = as_inner(x.detach().requires_grad_(wanted or not step.compiled)) if alike else x
        entry = inner.to(rerun.dtype)
        if followed is not None:
            followed.known[entry] = False
        rerun.watch.enters(entry, known, operands)
        with followed or contextlib.nullcontext(), rerun.watch.stance():
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
