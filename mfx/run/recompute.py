"""Recompute: run a step's branch a second time, and differentiate it.

1. The branch runs under the conditions of its first run (:mod:`mfx.run.conditions`), on detached inputs.
2. The modules' own parameters are what is differentiated by, as long as they are still the step's operands
   (:mod:`mfx.run.operands`, which sees to it that no gradient is lost).
3. The gradients of x, the side values and the parameters are those of one ``torch.autograd.grad``; those of sharded
   parameters are accumulated by their own hooks meanwhile (:mod:`mfx.sharding`).

Source: torch/utils/checkpoint.py, whose recomputation this follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mfx.errors import BackwardError, changed_in_place
from mfx.rule.step import StepSpec
from mfx.run.conditions import Conditions
from mfx.run.operands import (
    Owner,
    Parameters,
    modules_of,
    parameters_as_operands,
    refuse_lost,
    refuse_moved,
    storages_of,
    submodule,
)
from mfx.run.tape import Setting
from mfx.run.watched import Watch
from mfx.run.watching import saving
from mfx.sharding import Units, differentiated


class Turn(Protocol):
    """What a recomputation takes x from, and gives the branch's value to."""

    inside: Tensor

    def pass_on(self, value: Tensor | None) -> None: ...


@dataclass(frozen=True, eq=False)
class Rerun:
    """One step as it ran first, and all that it takes to run its branch again.

    ``owners`` hold each parameter; ``storages`` tell where its values lie;
    ``constants`` the operands that autograd does not save (None stands for those that it does); ``units`` the sharded
    parameters, if there are any.
    """

    setting: Setting
    index: int
    dtype: torch.dtype
    conditions: Conditions
    watch: Watch
    owners: tuple[tuple[Owner, ...], ...]
    storages: tuple[int | None, ...]
    constants: tuple[tuple[Any] | None, ...]
    units: Units | None

    @staticmethod
    def of(
        setting: Setting,
        index: int,
        dtype: torch.dtype,
        x: Tensor,
        parameters: Parameters,
        operands: Sequence[Any],
        saved: Sequence[bool],
    ) -> Rerun:
        """For the step whose branch is about to run."""
        step = setting.chain.steps[index]
        return Rerun(
            setting,
            index,
            dtype,
            conditions_of(step, setting.root, x, parameters.modules),
            Watch(() if setting.symbolic else parameters.modules),
            parameters.owners,
            storages_of(parameters.tensors),
            tuple(None if there else (operand,) for operand, there in zip(operands, saved, strict=True)),
            parameters.units,
        )

    @property
    def step(self) -> StepSpec:
        """The step itself."""
        return self.setting.chain.steps[self.index]

    def operands(self, saved: Iterator[Tensor]) -> list[Any]:
        """The step's operands, from those that autograd saved.

        Raises:
            BackwardError: a parameter was given other values meanwhile.
        """
        operands = [next(saved) if held is None else held[0] for held in self.constants]
        refuse_moved(self.step.name, self.owners, operands[len(self.step.sides) :], self.storages)
        return operands

    def differentiate(
        self,
        turn: Turn,
        operands: Sequence[Any],
        wanted: Sequence[bool],
        grad: Tensor | None,
        grad_extra: Sequence[Tensor | None],
        accumulate: bool = False,
    ) -> list[Tensor | None]:
        """Run the branch once more, and give the gradients of x and the operands from those of its values.

        The branch's value goes to ``turn`` and is let go before the branch is differentiated.  Sharded parameters
        ``accumulate`` their gradients, if they are to.
        """
        step, x = self.step, turn.inside.detach().to(self.dtype)
        asked = any(wanted) or accumulate
        differentiable = (grad is not None or any(one is not None for one in grad_extra)) and asked
        given = operands[len(step.sides) :]
        own = parameters_as_operands(self.owners, given, apart=self.units is not None)
        with self.conditions.restored(step.compiled), _gathering(self.units, step, differentiable), own as parameters:
            leaves = [_leaf(x, wanted[0]), *(_leaf(side) for side in operands[: len(step.sides)]), *parameters]
            del x
            with torch.set_grad_enabled(differentiable or step.compiled), self.watch.again():
                values = [*self._run([as_inner(leaf) for leaf in leaves[: 1 + len(step.sides)]])]
            values += self.watch.recomputed(step.name, grad_extra[len(values) - 1 :])
            turn.pass_on(values[0].detach())
            if not differentiable:
                return [None] * len(leaves)
            ends = [_end(value, cotangent) for value, cotangent in zip(values, (grad, *grad_extra), strict=True)]
            del values, grad, grad_extra
            into = self.units.gathered() if self.units is not None else []
            known = [*leaves, *into]
            grads = _gradients(ends, leaves, wanted, into=into if accumulate else [], units=self.units is not None)
            self._refuse_lost([end for end, _ in ends if end is not None], known, wanted, grads)
        return grads

    def opened(self, x: Tensor, operands: Sequence[Any]) -> Opened:
        """The branch once more, with its graph."""
        step = self.step
        if self.units is not None:
            raise BackwardError(
                f"block {step.name!r}: the gradient of a value that a module of it keeps is asked for (by a hook, "
                "retain_grad or torch.autograd.grad), and fully_shard shards its parameters, which are there for one "
                f"backward through it only. Keep the block as it is with exclude={step.name!r}, or use reversible=False"
            )
        sides, given = operands[: len(step.sides)], operands[len(step.sides) :]
        with self.conditions.restored(), parameters_as_operands(self.owners, given):
            leaves = [_leaf(x.to(self.dtype), True), *(_leaf(side) for side in sides)]
            with torch.enable_grad(), self.watch.again():
                entry, *inner = [as_inner(leaf) for leaf in leaves]
                value, *extra = self._run([entry, *inner])
            extra += self.watch.recomputed(step.name, (value,))
        return Opened(leaves, entry, [value, *extra])

    def _run(self, values: Sequence[Any]) -> tuple[Any, ...]:
        setting = self.setting
        x, *sides = values
        with setting.autocast(), self.conditions.rewound(), self.watch.stance():
            return self.step.again(setting.root, x, *sides)

    def _refuse_lost(
        self, ends: Sequence[GradientEdge], known: list[Any], wanted: Sequence[bool], grads: list[Tensor | None]
    ) -> None:
        """Look for lost gradients, the first time and whenever a parameter has none (M15)."""
        missing = [want and grad is None for want, grad in zip(wanted, grads, strict=True)][1 + len(self.step.sides) :]
        proven = self.setting.chain.proven
        if not self.setting.symbolic and (self.index not in proven or any(missing)):
            refuse_lost(self.step, list(zip(self.owners, missing, strict=True)), [end.node for end in ends], known)
            proven.add(self.index)


def _end(value: Any, cotangent: Tensor | None) -> tuple[GradientEdge | None, Tensor | None]:
    """Where the graph of a value ends, which is all that a backward needs of it, and the gradient in its dtype."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None, None
    return get_gradient_edge(value), None if cotangent is None else cotangent.to(value.dtype)


@dataclass(frozen=True, eq=False)
class Opened:
    """A branch that ran once more: x and sides as leaves, x as the branch saw it, all values with their graph."""

    leaves: list[Any]
    entry: Tensor
    values: list[Any]

    def gradients(self, cotangents: Sequence[Tensor | None], by: Sequence[Any]) -> list[Tensor | None]:
        """The gradients of values ``by`` on the way, from those of all that left the branch."""
        wanted = [isinstance(value, Tensor) and value.requires_grad for value in by]
        ends = [_end(value, cotangent) for value, cotangent in zip(self.values, cotangents, strict=True)]
        return _gradients(ends, list(by), wanted, again=True)

    def reads(self, number: int, value: Any) -> bool:
        """Whether the value ``number`` is computed from this one."""
        other = self.values[number]
        cotangents = [torch.zeros_like(one) if one is other else None for one in self.values]
        return isinstance(other, Tensor) and self.gradients(cotangents, [value])[0] is not None


@contextlib.contextmanager
def _gathering(units: Units | None, step: StepSpec, differentiable: bool) -> Iterator[None]:
    """Around a recomputation of a step whose parameters are sharded, in part."""
    if units is None:
        yield
        return
    units.refuse_changed(step.name)
    units.as_in_forward()
    yield
    if not differentiable:
        units.free()


def _gradients(
    ends: Sequence[tuple[GradientEdge | None, Tensor | None]],
    leaves: list[Any],
    wanted: Sequence[bool],
    again: bool = False,
    units: bool = False,
    into: Sequence[Tensor] = (),
) -> list[Tensor | None]:
    """The gradients of the wanted leaves; None for the others, and for those that no cotangent reaches.

    Where there are sharded ``units``, the gradients of their parameters ``into`` which they go are accumulated.
    """
    pairs = [(end, cotangent) for end, cotangent in ends if end is not None and cotangent is not None]
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    if not pairs or not (asked or into):
        return [None] * len(leaves)
    reached, given = zip(*pairs, strict=True)
    if units:
        found = iter(differentiated(reached, given, asked, into))
    else:
        found = iter(torch.autograd.grad(reached, asked, given, retain_graph=again, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def conditions_of(
    step: StepSpec, root: nn.Module, x: Tensor, called: tuple[nn.Module, ...] | None = None
) -> Conditions:
    """The conditions of a step's branch, with the modules in the modes they are in."""
    called = modules_of([step], root) if called is None else called
    buffers = tuple((submodule(root, path), name) for path, name in step.buffers)
    # On a jagged tensor torch draws for a dropout of p = 0 as well.
    return Conditions.of(step.name, called, buffers, step.draws or x.is_nested, x)


@contextlib.contextmanager
def as_recomputed(step: StepSpec) -> Iterator[None]:
    """The grad mode of the recomputation, for branches that look at it, and compiled ones.

    What autograd saves goes with the branch's value (M14).  Dropped altogether, a branch that differentiates inside
    could not run.
    """
    if step.compiled:
        with torch.enable_grad():
            yield
    elif step.sees_grad_mode:
        with torch.enable_grad(), saving():
            yield
    else:
        yield


def _leaf(value: Any, wanted: bool | None = None) -> Any:
    """A value without history, to differentiate by (if it was, where that is not said)."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad if wanted is None else wanted)


def as_inner(leaf: Any) -> Any:
    """A leaf as the branch sees it, with a node of its own: tools that follow modules put hooks on their inputs' nodes,
    which a leaf that is differentiated by does not run (ModuleTracker, and FlopCounterMode with it)."""
    return leaf.view_as(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def saved_tensors(ctx: Any, what: str) -> tuple[Tensor, ...]:
    """What autograd saved; ``what`` says what may have been changed meanwhile."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise changed_in_place(what, error) from error
