"""Chain: what is run.

:class:`Inner` keeps, in the reversible run and the stored one, the values of a chain that later steps of it, or others,
read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import InputTypeError
from mfx.rule.arithmetic.carry import EAGER, Kernels
from mfx.rule.arithmetic.snapshots import Schedule
from mfx.rule.step import Escape, State, StepSpec, tail_of
from mfx.rule.varying import Varies, gammas_of, varied
from mfx.run.conditions import autocast_dtype, compiling, is_symbolic
from mfx.run.detector import Drift
from mfx.run.operands import modules_of
from mfx.sharding import casting, coarsest
from mfx.torch_versions import forward_derivative_is_on, functions_are_transformed, has_float64, is_recording


@dataclass(frozen=True, eq=False)
class ChainSpec:
    """A chain, as far as running it needs.

    ``taps`` are the steps whose result is handed out as well, in both cases as z where it ``reads_z``
    (:attr:`mfx.rule.base.Rule.coast`); ``copied`` the positions among all values handed
    out that somebody outside will write to in place, and that are therefore handed out as copies; ``kept`` the steps
    that keep their activations all the same where the chain is ``reversible``; from the ``tail`` on all do.
    ``schedule(dtype, compute, float64=)`` is that of :func:`mfx.rule.arithmetic.snapshots.schedule`; ``kernels`` do the
    arithmetic of its state; ``drift`` takes what its backwards measure, ``proven`` the steps of which one has shown
    that no gradient is lost, ``followed`` those of which a run has shown that their modules leave nothing elsewhere.
    ``opens`` says that x_0 is an argument of the module, ``leaves`` that x_N is what it returns: such chains of several
    modules may be linked (:mod:`mfx.run.linked`).
    """

    name: str
    steps: tuple[StepSpec, ...]
    schedule: Callable[..., Schedule]
    taps: tuple[int, ...] = ()
    reads_z: bool = False
    copied: frozenset[int] = frozenset()
    reversible: bool = True
    kept: frozenset[int] = frozenset()
    index: int = 0
    drift: Drift = field(default_factory=Drift)
    kernels: Kernels = EAGER
    proven: set[int] = field(default_factory=set)
    followed: set[int] = field(default_factory=set)
    opens: bool = False
    leaves: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """The steps before which a segment ends: after each tap, and at the end."""
        return (*(tap + 1 for tap in self.taps), len(self.steps))

    @property
    def tail(self) -> int:
        """The step from which on nothing is undone in backward."""
        return tail_of(len(self.steps), self.kept)

    def coast(self, index: int) -> float | Tensor | None:
        """How much of the velocity after a step belongs to what is handed out there; None: nothing."""
        rule = self.steps[index].rule
        return None if not self.reads_z or rule.plain else rule.coast


def with_gammas(chain: ChainSpec, gammas: Tensor | None, x: Tensor) -> ChainSpec:
    """The chain by the ``gammas`` of this call; as it is planned where there are no values."""
    if not any(isinstance(step.rule, Varies) for step in chain.steps) or is_symbolic(x):
        return chain
    steps = varied(
        chain.name, chain.steps, gammas, x, known=not (is_recording() or compiling(x) or functions_are_transformed())
    )
    learned = any(gamma is not None and gamma.requires_grad for gamma in gammas_of(steps))
    planned = partial(chain.schedule, rules=tuple(step.rule.planned for step in steps), velocities=learned)
    return replace(chain, steps=steps, schedule=planned)


def wants_gradient(x: Tensor, velocity: Tensor | None, operands: Sequence[Sequence[Any]]) -> bool:
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


def schedule_of(chain: ChainSpec, root: nn.Module, x: Tensor, **instead: Any) -> Schedule:
    """The schedule for an input such as ``x``, in the dtype that branches compute in; ``instead``: for other rules."""
    if x.is_complex():
        raise InputTypeError(
            f"{chain.name}: its input is complex ({x.dtype}), and the momentum recurrence is defined here for real "
            f"numbers. Keep its blocks as they are with exclude={chain.steps[0].name!r} ..., or split the values into "
            "real and imaginary part (torch.view_as_real)"
        )
    if x.is_nested and x.layout != torch.jagged:
        raise InputTypeError(
            f"{chain.name}: its input is a nested tensor of layout {x.layout}, whose state cannot be undone: make it "
            "with layout=torch.jagged"
        )
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    casts = (autocast_dtype(x.device, dtype), casting(modules_of(chain.steps, root)))
    return chain.schedule(dtype, coarsest(casts), float64=has_float64(x.device), **instead)


def gradient_dtype(dtype: torch.dtype, carried: torch.dtype) -> torch.dtype:
    """In which dtype the gradient of a state goes on, which the model has in ``dtype``.

    That of the state, as in the model itself where nothing is carried finer (M1); but not finer than float32, unless
    the model is.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return wide if torch.promote_types(wide, carried) == carried else carried


def copies(chain: ChainSpec, values: Sequence[Any]) -> tuple[Any, ...]:
    """What is handed out, with copies in the place of what somebody outside writes to."""
    return tuple(v.clone() if n in chain.copied and isinstance(v, Tensor) else v for n, v in enumerate(values))


def continued(out: Tensor, x: Tensor) -> Tensor:
    """``x`` as it was carried, as the value of which ``out`` was handed out: its gradient passes through ``out``."""
    return out if out.dtype == x.dtype else Continue.apply(out, x.detach())  # type: ignore[return-value]


class Continue(torch.autograd.Function):
    """``(out, x) -> x`` with the gradient of x, and its tangent, those of ``out``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return *grad_outputs, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].to(ctx.dtype)


class ReadOut(torch.autograd.Function):
    """``(x, v) -> z = x + c v``; the gradient of v is a tensor of its own, which whoever gets it may use up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, coast: float | Tensor) -> Tensor:
        ctx.dtype, ctx.coast = v.dtype, coast.detach() if isinstance(coast, Tensor) else coast
        ctx.save_for_backward(v if ctx.needs_input_grad[2] else None)
        return _z(x, v, coast)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (v,) = grads, ctx.saved_tensors
        wide = grad.to(ctx.dtype)
        of_coast = None if v is None else (wide * v).sum_to_size(ctx.coast.shape).to(ctx.coast.dtype)
        return grad, (wide * ctx.coast).to(ctx.dtype), of_coast


def _z(x: Tensor, v: Tensor, coast: float | Tensor) -> Tensor:
    return (x + v.to(torch.promote_types(x.dtype, torch.float32)) * coast).to(x.dtype)


class Inner:
    """The values of a chain that later steps of it, or others, read."""

    def __init__(self, chain: ChainSpec) -> None:
        self.chain = chain
        self.states: dict[int, Tensor] = {}
        self.handed: dict[int, Tensor] = {}
        self.escapes: list[list[Any]] = []
        self.wanted = {side.step for step in chain.steps for side in step.sides if isinstance(side, State)}

    def sides(self, index: int, outer: Sequence[Any]) -> list[Any]:
        """A step's side values, those from outside being the first of ``outer``."""
        given = iter(outer)
        return [next(given) if side is None else self._value(side) for side in self.chain.steps[index].sides]

    def record(self, x: Tensor | None, escapes: list[Any], dtype: torch.dtype | None = None) -> None:
        """Note what a step gave; its state may be None where :meth:`close` gives it, or nobody reads it."""
        index = len(self.escapes)
        self.escapes.append(escapes)
        if x is not None and index in self.wanted:
            self.states[index] = x if dtype is None else x.to(dtype)

    def escaped(self, begin: int) -> list[Any]:
        """The branch values handed out by the steps from ``begin`` on."""
        return [value for escapes in self.escapes[begin:] for value in escapes]

    def close(self, x: Tensor, escapes: Sequence[Any], begin: int) -> None:
        """Take what the steps from ``begin`` on hand out, for what they gave: later steps read what users see."""
        last = len(self.escapes) - 1
        if last in self.wanted:
            self.states[last] = x
        given = iter(escapes)
        self.escapes[begin:] = [[next(given) for _ in group] for group in self.escapes[begin:]]

    def read_out(self, x: Tensor, v: Tensor | None, apart: bool = False) -> None:
        """Note what is handed out for the state after the last step, from (x, v); ``apart``: as :class:`ReadOut`."""
        index = len(self.escapes) - 1
        coast = self.chain.coast(index)
        if coast is not None:
            assert v is not None
            x = ReadOut.apply(x, v, coast) if apart else _z(x, v, coast)  # type: ignore[assignment]
        self.handed[index] = x

    def handed_out(self) -> list[Any]:
        """What is read out at the end and at the taps, then the escapes."""
        return [self.handed[index] for index in (len(self.chain.steps) - 1, *self.chain.taps)] + self.escaped(0)

    def _value(self, side: State | Escape) -> Any:
        return self.states[side.step] if isinstance(side, State) else self.escapes[side.step][side.number]
