"""Recompute: run a step's branch a second time, and differentiate it.

1. The branch runs under the conditions of its first run (:mod:`mfx.run.conditions`), on detached inputs.
2. The modules' own parameters are what is differentiated by, as long as they are still the step's operands
   (:mod:`mfx.run.operands`, which sees to it that no gradient is lost).
3. The gradients of x, the side values and the parameters are those of one ``torch.autograd.grad``.

Source: torch/utils/checkpoint.py, whose recomputation this follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError
from mfx.rule.step import StepSpec
from mfx.run.conditions import Conditions
from mfx.run.operands import Owner, Parameters, modules_of, parameters_as_operands, refuse_lost, submodule
from mfx.run.tape import Setting
from mfx.run.watched import Watch


@dataclass(frozen=True, eq=False)
class Rerun:
    """One step as it ran first, and all that it takes to run its branch again.

    ``owners`` hold each parameter; ``pointers`` tell the storage of its values;
    ``constants`` the operands that autograd does not save (None stands for those that it does).
    """

    setting: Setting
    index: int
    dtype: torch.dtype
    conditions: Conditions
    watch: Watch
    owners: tuple[tuple[Owner, ...], ...]
    pointers: tuple[int | None, ...]
    constants: tuple[tuple[Any] | None, ...]

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
            tuple(map(_pointer, parameters.tensors)),
            tuple(None if there else (operand,) for operand, there in zip(operands, saved, strict=True)),
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
        self._refuse_moved(operands[len(self.step.sides) :])
        return operands

    def differentiate(
        self,
        x: Tensor,
        operands: Sequence[Any],
        wanted: Sequence[bool],
        grad: Tensor | None,
        grad_extra: Sequence[Tensor | None],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The branch's value once more, and the gradients of x and the operands from those of its values."""
        step = self.step
        differentiable = (grad is not None or any(one is not None for one in grad_extra)) and any(wanted)
        given = operands[len(step.sides) :]
        with self.conditions.restored(), parameters_as_operands(self.owners, given) as parameters:
            leaves = [_leaf(x, wanted[0]), *(_leaf(side) for side in operands[: len(step.sides)]), *parameters]
            with torch.set_grad_enabled(differentiable), self.watch.again():
                value, *extra = self._run([_inner(leaf) for leaf in leaves[: 1 + len(step.sides)]])
            extra += self.watch.recomputed(step.name, grad_extra[len(extra) :])
            if not differentiable:
                return value, [None] * len(leaves)
            grads = _gradients((value, *extra), (grad, *grad_extra), leaves, wanted)
            self._refuse_lost((value, *extra), leaves, wanted, grads)
        return value.detach(), grads

    def _run(self, values: Sequence[Any]) -> tuple[Any, ...]:
        setting = self.setting
        x, *sides = values
        with setting.autocast(), self.conditions.rewound(), setting.draws(self.index, again=True):
            return self.step.again(setting.root, x.to(self.dtype), *sides)

    def _refuse_lost(
        self, outputs: Sequence[Any], leaves: list[Any], wanted: Sequence[bool], grads: list[Tensor | None]
    ) -> None:
        """Look for lost gradients, the first time and whenever a parameter has none (M15)."""
        missing = [want and grad is None for want, grad in zip(wanted, grads, strict=True)][1 + len(self.step.sides) :]
        proven = self.setting.chain.proven
        if not self.setting.symbolic and (self.index not in proven or any(missing)):
            tensors = [output for output in outputs if isinstance(output, Tensor)]
            refuse_lost(self.step, list(zip(self.owners, missing, strict=True)), tensors, leaves)
            proven.add(self.index)

    def _refuse_moved(self, parameters: Sequence[Any]) -> None:
        for ((module, name), *_), operand, pointer in zip(self.owners, parameters, self.pointers, strict=True):
            if module._parameters.get(name) is operand and pointer is not None and _pointer(operand) != pointer:
                raise BackwardError(
                    f"block {self.step.name!r}: parameter {name!r} of {type(module).__name__} was given other values "
                    "(.data = ...) between forward and backward, so its branch cannot be recomputed as it ran. Do so "
                    "after backward"
                )


def _gradients(
    outputs: Sequence[Any], cotangents: Sequence[Tensor | None], leaves: list[Any], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the wanted leaves; None for the others, and for those that no cotangent reaches."""
    pairs = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None and output.requires_grad
    ]
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    if not pairs or not asked:
        return [None] * len(leaves)
    reached, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(reached, asked, given, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def conditions_of(
    step: StepSpec, root: nn.Module, x: Tensor, called: tuple[nn.Module, ...] | None = None
) -> Conditions:
    """The conditions of a step's branch, with the modules in the modes they are in."""
    called = modules_of(step, root) if called is None else called
    buffers = tuple((submodule(root, path), name) for path, name in step.buffers)
    return Conditions.of(step.name, called, buffers, step.draws, x)


@contextlib.contextmanager
def as_recomputed(step: StepSpec) -> Iterator[None]:
    """The grad mode of the recomputation, for branches that look at it.

    What autograd saves it saves without history, and it goes with the branch's value: kept as it is, a node that saves
    its own result would be a cycle that nothing frees (M14).  Dropped altogether, a branch that differentiates inside
    could not run.
    """
    if not step.sees_grad_mode:
        yield
        return
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved),
    ):
        yield


def _leaf(value: Any, wanted: bool | None = None) -> Any:
    """A value without history, to differentiate by (if it was, where that is not said)."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad if wanted is None else wanted)


def _inner(leaf: Any) -> Any:
    """A leaf as the branch sees it, with a node of its own: tools that follow modules put hooks on their inputs' nodes,
    which a leaf that is differentiated by does not run (ModuleTracker, and FlopCounterMode with it)."""
    return leaf.view_as(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _pointer(operand: Any) -> int | None:
    """Which storage a parameter's values lie in; None where that cannot be told.

    Storage that was freed and filled anew meanwhile, as FSDP does it, is the same one elsewhere in memory.
    """
    plain = type(operand) in (Tensor, nn.Parameter) and not operand.is_meta
    return operand.untyped_storage()._cdata if plain else None


def saved_tensors(ctx: Any, what: str) -> tuple[Tensor, ...]:
    """What autograd saved; ``what`` says what may have been changed meanwhile."""
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
