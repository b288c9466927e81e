"""Run a chain: without storing activations where gradients are wanted, plainly elsewhere.

1. ``Close`` ends the chain.  Every value that leaves the chain leaves through it, and it alone saves the end
   state and the snapshots, so every backward starts there: it puts the state on the *tape* (:mod:`mfx.tape`).
2. Each ``Step`` takes (x', v') off the tape, steps back to ``x = x' - v'`` (or takes x from a snapshot), runs its
   branch once more under the conditions of the first run (:mod:`mfx.recompute`), differentiates it, and leaves
   (x, v) on the tape.  Its gradients leave at once, so the last block's come first (M10).

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.2.
Known limits: first derivatives only; double backward raises (M8).  Under ``torch.func`` transforms and
forward-mode differentiation the recurrence runs with stored activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from mfx.carry import carry
from mfx.counter import Seed
from mfx.errors import BackwardError, InputTypeError
from mfx.momentum import ChainSpec, Inner, StepSpec, check_velocity, stored
from mfx.precision import Schedule
from mfx.recompute import Autocast, Conditions, autocast_dtype, is_symbolic, parameters_as_operands, submodule
from mfx.tape import Tape, compiling, of_twin, size_of, twin_of


def run(
    chain: ChainSpec,
    root: nn.Module,
    x: Tensor,
    velocity: Tensor | None,
    *operands: Sequence[Any],
    seed: Tensor | None = None,
) -> tuple[Any, ...]:
    """Run ``chain`` from (x_0, v_0); gives x_N, the taps, and the escapes of each step in order.

    While a compiler traces, random operations draw from ``seed`` (:mod:`mfx.random`).
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
    return chain.schedule(dtype, autocast_dtype(x.device, dtype), not compiling(x))


def _wants_gradient(x: Tensor, velocity: Tensor | None, operands: Sequence[Sequence[Any]]) -> bool:
    """Whether there is something to differentiate, in the one way the reversible run can (M8, M9)."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0:
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
    tape = Tape(chain, plan, root, Autocast.current(x.device), dtype)
    tape.start = v
    tape.seed = None if seed is None else Seed(seed)
    tape.twin = None if tape.seed is None else tape.seed.twin()
    tape.symbolic = is_symbolic(x)
    inner = Inner(chain)
    for index in range(len(chain.steps)):
        x, v, *extra = Step.apply(tape, index, x, v, *inner.operands(index, operands[index]))  # type: ignore[misc]
        inner.record(x, extra, tape.dtypes[-1])
    return Close.apply(tape, x, v, *inner.handed_out())  # type: ignore[return-value]


class Step(torch.autograd.Function):
    """``(x, v, operands) -> (x', v', escapes)``; saves its operands only."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, index: int, x: Tensor, v: Tensor | None, *operands: Any) -> Any:
        step = tape.chain.steps[index]
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.index = tape, index
        to_save = [isinstance(operand, Tensor) and i not in step.statistics for i, operand in enumerate(operands)]
        ctx.save_for_backward(*compress(operands, to_save))
        ctx.constants = [None if saved else (operand,) for operand, saved in zip(operands, to_save, strict=True)]
        if tape.first is None and any(ctx.needs_input_grad):
            tape.first = index
        if index in tape.plan.snapshots:
            tape.snapshots[index] = (x, v if tape.plan.keeps_velocity(index) else None)
        x, v = tape.carry.enter(index, x, v)
        tape.observe(0, x, v) if index == 0 else None
        tape.strides.append(x.stride())
        sides = operands[: len(step.sides)]
        _refuse_containers(step, [side for side in sides if not isinstance(side, Tensor)], "takes")
        seen = [x, *compress(sides, to_save)]
        versions = [] if tape.symbolic else [tensor._version for tensor in seen]
        ctx.conditions = conditions_of(step, tape.root, x)
        ctx.owners = [[(submodule(tape.root, path), name) for path, name in names] for names in step.parameters]
        ctx.pointers = [_pointer(operand) for operand in operands[len(step.sides) :]]
        with tape.autocast(), ctx.conditions.recorded(), _as_recomputed(step), tape.draws(index, again=False):
            inner = x.detach().requires_grad_() if step.sees_grad_mode else x
            value, *extra = step.branch(tape.root, inner.to(tape.dtypes[index]), *sides)
        value, *extra = [_tensor_or_plain(step, out) for out in (value, *extra)]
        if versions and [tensor._version for tensor in seen] != versions:
            raise BackwardError(
                f"block {step.name!r}: its branch writes in place to x or to a value from outside it, so it cannot "
                f"be recomputed. Write to a copy (.clone()), or keep the block as it is with exclude={step.name!r}"
            )
        tape.dtypes.append(step.result_dtype(tape.dtypes[index], value.dtype))
        x, v = tape.carry.advance(index, x, v, value)
        tape.observe(index + 1, x, v)
        return (x, v, *extra)

    @staticmethod
    def backward(ctx: Any, *grads_out: Tensor | None) -> Any:
        grad_x, grad_v, *grad_extra = grads_out
        _refuse_double_backward(ctx.tape)
        tape, index = ctx.tape, ctx.index
        step: StepSpec = tape.chain.steps[index]
        x, v, after = tape.before(index)
        inside, known = tape.carry.enter(index, x, v)
        saved = iter(_saved(ctx, f"a parameter or side input of block {step.name!r}"))
        operands = [next(saved) if held is None else held[0] for held in ctx.constants]
        _refuse_moved(ctx, step, operands)
        grad_v = _sum(grad_v, grad_x)
        pull = None if grad_v is None else grad_v * ((1 - step.gamma) * step.scale)
        rest = any(grad is not None for grad in grad_extra)
        divides = index not in tape.plan.snapshots and step.gamma != 0 and (index > 0 or tape.observer is not None)
        value, grads = None, [None] * (1 + len(operands))
        if divides or pull is not None or rest:
            value, grads = _recompute(ctx, step, inside, operands, pull, grad_extra)
        if value is not None and (index == 0 or index in tape.plan.snapshots):
            tape.check(index, inside, known, after, value)
        if divides and value is not None:
            assert after is not None and after[1] is not None
            v = tape.carry.v_before(index, inside, after[1], value)
        tape.observe(index, inside, v)
        tape.leave(index, x, v)
        own_x, own_v = _state_gradients(step, grad_x, grad_v, pull, grads[0])
        return None, None, own_x, own_v if ctx.needs_input_grad[3] else None, *grads[1:]


def _state_gradients(
    step: StepSpec, grad_x: Tensor | None, total: Tensor | None, pull: Tensor | None, branch: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and v, from that of x', that of v' with x' in it, and the branch's."""
    if step.wrapped and total is not None:
        through = None if step.gamma == 0 and grad_x is total else _sum(grad_x, -pull)  # type: ignore[operator]
    else:
        through = grad_x
    return _sum(through, branch), None if total is None or step.gamma == 0 else total * step.gamma


def _recompute(
    ctx: Any,
    step: StepSpec,
    x: Tensor,
    operands: list[Any],
    pull: Tensor | None,
    grad_extra: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """The branch's value once more, and the gradients of x and the operands."""
    tape, conditions = ctx.tape, ctx.conditions
    wanted = ctx.needs_input_grad[2:3] + ctx.needs_input_grad[4:]
    differentiate = (pull is not None or any(grad is not None for grad in grad_extra)) and any(wanted)
    with conditions.restored(), parameters_as_operands(ctx.owners, operands[len(step.sides) :]) as parameters:
        sides = [_leaf(side) for side in operands[: len(step.sides)]]
        x = x.detach().requires_grad_(wanted[0])
        with (
            torch.set_grad_enabled(differentiate),
            tape.autocast(),
            conditions.rewound(),
            tape.draws(ctx.index, again=True),
        ):
            value, *extra = step.again(tape.root, x.to(tape.dtypes[ctx.index]), *sides)
        leaves = [x, *sides, *parameters]
        if not differentiate:
            return value, [None] * len(leaves)
        pairs = [
            (output, grad.to(output.dtype))
            for output, grad in zip((value, *extra), (pull, *grad_extra), strict=True)
            if grad is not None and output.requires_grad
        ]
        grads = _gradients(pairs, leaves, wanted)
    return value.detach(), grads


def _gradients(pairs: list[tuple[Tensor, Tensor]], leaves: list[Any], wanted: Sequence[bool]) -> list[Tensor | None]:
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    if not pairs or not asked:
        return [None] * len(leaves)
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, asked, cotangents, allow_unused=True))
    return [next(found) if want else None for want in wanted]


class Close(torch.autograd.Function):
    """``(x_N, v_N, handed out) -> (x_N, handed out)``; saves the end state and the snapshots."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, x: Tensor, v: Tensor, *handed: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.tape = tape
        kept = [tensor for pair in tape.snapshots.values() for tensor in pair if tensor is not None]
        kept = list(map(twin_of, kept)) if compiling(x) else kept
        end = [x, v] if tape.inverts_last else []
        start = [] if tape.start is None else [tape.start]
        ctx.save_for_backward(*end, *start, *kept)
        ctx.starts, tape.start = bool(start), None
        if not tape.inverts_last and not compiling(x):
            tape.size = size_of(x)
        ctx.layout = [(index, pair[1] is not None) for index, pair in tape.snapshots.items()]
        ctx.dtype = x.dtype
        tape.snapshots = {}
        values = (x.to(tape.dtypes[-1]), *handed)
        return tuple(_handed_out(value, index in tape.chain.copied) for index, value in enumerate(values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tape = ctx.tape
        _refuse_double_backward(tape)
        saved = iter(_saved(ctx, f"an output of {tape.chain.name}, or a value it keeps,"))
        tape.state = (next(saved), next(saved)) if tape.inverts_last else None
        tape.start = next(saved) if ctx.starts else None
        tape.drifts = []
        end = tape.state
        tape.end = None if end is None else size_of(tape.carry.velocity(len(tape.chain.steps), end[1]))
        snapshots = (value if value.is_floating_point() else of_twin(value, ctx.dtype) for value in saved)
        tape.snapshots = {index: (next(snapshots), next(snapshots) if both else None) for index, both in ctx.layout}
        tape.position = len(tape.chain.steps)
        return None, grads[0], None, *grads[1:]


@contextlib.contextmanager
def _as_recomputed(step: StepSpec) -> Iterator[None]:
    """The grad mode of the recomputation, for branches that look at it; what autograd saves is let go."""
    if not step.sees_grad_mode:
        yield
        return
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
    ):
        yield


def _handed_out(value: Any, copied: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if copied else value.detach()


def conditions_of(step: StepSpec, root: nn.Module, x: Tensor) -> Conditions:
    """The conditions of a step's branch, with the modules in the modes they are in."""
    called = {module: None for path in step.modules for module in submodule(root, path).modules()}
    buffers = tuple((submodule(root, path), name) for path, name in step.buffers)
    return Conditions.of(step.name, tuple(called), buffers, step.draws, x)


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


def _leaf(side: Any) -> Any:
    return side.detach().requires_grad_(side.requires_grad) if isinstance(side, Tensor) else side


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _pointer(operand: Any) -> int | None:
    """Where a parameter's values lie; None where that cannot be told."""
    plain = type(operand) in (Tensor, nn.Parameter) and not operand.is_meta
    return operand.data_ptr() if plain else None


def _saved(ctx: Any, what: str) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise BackwardError(
            f"{what} was changed in place between forward and backward, so the chain cannot be run backwards as it "
            "ran forwards. Change it after backward, or on a copy (.clone()); with reversible=False activations are "
            f"stored. From autograd: {error}"
        ) from error


def _refuse_lazy(chain: ChainSpec, operands: Sequence[Sequence[Any]]) -> None:
    for step, group in zip(chain.steps, operands, strict=True):
        if any(is_lazy(operand) for operand in group):
            raise InputTypeError(
                f"block {step.name!r} has a lazy module whose parameters have no shape yet: run the model once without "
                "gradients (torch.no_grad()) first"
            )


def _refuse_moved(ctx: Any, step: StepSpec, operands: list[Any]) -> None:
    for ((module, name), *_), operand, pointer in zip(
        ctx.owners, operands[len(step.sides) :], ctx.pointers, strict=True
    ):
        if module._parameters.get(name) is operand and pointer is not None and _pointer(operand) != pointer:
            raise BackwardError(
                f"block {step.name!r}: parameter {name!r} of {type(module).__name__} was given other values "
                "(.data = ...) between forward and backward, so its branch cannot be recomputed as it ran. Do so "
                "after backward"
            )


def _refuse_double_backward(tape: Tape) -> None:
    if torch.is_grad_enabled():
        raise BackwardError(
            f"{tape.chain.name}: create_graph=True (double backward) is not supported by the reversible run. "
            "Use reversible=False, which stores activations and can be differentiated any number of times"
        )
