"""Inverse: the chains of a momentumized model as functions of their own, forward and backwards.

A chain maps (x_0, v_0) to (x_N, v_N) and back, in closed form, by its rule (:mod:`mfx.rule`).

1. Both run in floating arithmetic, in the precision above that of the branches (float64), with no snapshots: the
   inverse knows nothing but (x_N, v_N).
2. Its error is that of :mod:`mfx.rule.arithmetic.precision`: u times the product of the growth of the steps.  Branches
   coarser than the state add their own roundoff; :meth:`Chain.bound` counts with it.
3. Normalization layers in train mode use the batch's statistics and move none; random draws cannot be repeated
   and are refused.

Gradients flow through both, by autograd, with stored activations.  Training takes the reversible run instead.

Reference: Sander et al., ICML 2021, arXiv 2102.07870, equations (5) and (6).
Known limits: a step that reads an earlier state or branch value of its own chain cannot be inverted from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError, InputTypeError, OptionError
from mfx.model.parts import parts_of
from mfx.rule.arithmetic.precision import floating_error
from mfx.rule.step import Escape, State, advance, check_velocity, retreat
from mfx.rule.varying import Varies
from mfx.run import ChainSpec
from mfx.run.recompute import conditions_of, submodule


class Chain:
    """A chain of a momentumized model, as a map (x_0, v_0) -> (x_N, v_N) with an inverse.

    Made by :func:`mfx.chains`.  It uses the model's own modules and parameters, in the modes they are in.
    """

    def __init__(self, spec: ChainSpec, root: nn.Module) -> None:
        self._spec = spec
        self._root = root

    def __repr__(self) -> str:
        return f"<chain {self.name}: {len(self.blocks)} blocks, {self.blocks[0]} to {self.blocks[-1]}>"

    @property
    def name(self) -> str:
        """As in the printed graph and in :func:`mfx.drift`."""
        return self._spec.name

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks' names, in order."""
        return tuple(step.name for step in self._spec.steps)

    @property
    def gammas(self) -> tuple[float, ...]:
        """gamma of each block."""
        return tuple(step.rule.decay for step in self._spec.steps)

    @property
    def side_counts(self) -> tuple[int, ...]:
        """How many values from outside the chain (masks, memory, positional biases) each block's branch takes."""
        return tuple(sum(side is None for side in step.sides) for step in self._spec.steps)

    def bound(self, dtype: torch.dtype) -> float:
        """The relative error that :meth:`inverse` may make for branches in ``dtype``, by the error model."""
        return floating_error((step.rule for step in self._spec.steps), torch.finfo(dtype).eps / 2)

    def forward(
        self, x: Tensor, v: Tensor | None = None, sides: Sequence[Sequence[Any]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the chain.

        Args:
            x: x_0, in the dtype that the branches compute in or a finer one.
            v: v_0; None is zero.
            sides: for each block the values from outside the chain that its branch takes, as the model computes
                them (:attr:`side_counts`); may be left out where there are none.

        Returns:
            (x_N, v_N) in float64.

        Raises:
            OptionError: ``sides`` does not fit, or gamma is given by a module.
            InputTypeError: ``x`` is complex.
            BackwardError: a branch draws random numbers, or reads an earlier value of the chain.

        Example:
            >>> import torch, torchvision, mfx
            >>> model = torchvision.models.resnet18(weights=None).eval()
            >>> chain = mfx.chains(mfx.momentumize(model, gamma=0.9))[0]
            >>> x = torch.randn(1, 64, 8, 8)
            >>> chain.forward(x)[0].shape
            torch.Size([1, 64, 8, 8])
        """
        groups = self._check(x, v, sides)
        dtype = self._dtype(x)
        x = x.to(torch.float64)
        v = None if v is None else v.to(torch.float64)
        for index, step in enumerate(self._spec.steps):
            x, v = advance(step, x, v, self._value(index, x, groups[index], dtype))
        assert v is not None
        return x, v

    __call__ = forward

    def inverse(self, x: Tensor, v: Tensor, sides: Sequence[Sequence[Any]] | None = None) -> tuple[Tensor, Tensor]:
        """Run the chain backwards: ``inverse(*forward(x, v))`` is (x, v) up to :meth:`bound`.

        Args:
            x: x_N.
            v: v_N, as :meth:`forward` gives it; in float64, or precision is lost before it starts.
            sides: as for :meth:`forward`, and the same values.

        Returns:
            (x_0, v_0) in float64.

        Raises:
            OptionError: some gamma is 0, which loses the velocity before it; or ``sides`` does not fit.
            InputTypeError: ``x`` is complex.
            BackwardError: a branch draws random numbers, or reads an earlier value of the chain.

        Example:
            >>> import torch, torchvision, mfx
            >>> model = torchvision.models.resnet18(weights=None).double().eval()
            >>> chain = mfx.chains(mfx.momentumize(model, gamma=0.9))[0]
            >>> x = torch.randn(1, 64, 8, 8, dtype=torch.float64)
            >>> again, v_0 = chain.inverse(*chain.forward(x))
            >>> bool((again - x).norm() < 1e-10), bool(v_0.norm() < 1e-10)
            (True, True)

        Source: Sander et al., ICML 2021, arXiv 2102.07870, equation (6).
        """
        groups = self._check(x, v, sides)
        zero = [step.name for step in self._spec.steps if step.rule.forgets]
        if zero:
            raise OptionError(
                f"{self.name} has gamma 0 at {zero}: v' = F(x) there, whatever v was, so the chain has no inverse. "
                "Give these blocks a gamma above 0 (mfx.set_gamma)"
            )
        dtype = self._dtype(x)
        x, v = x.to(torch.float64), v.to(torch.float64)
        for index in reversed(range(len(self._spec.steps))):
            step = self._spec.steps[index]
            x = step.rule.x_before(x, v)
            v = retreat(step, x, v, self._value(index, x, groups[index], dtype))
        return x, v

    def _dtype(self, x: Tensor) -> torch.dtype:
        """What the branches compute in: their parameters' dtype."""
        for step in self._spec.steps:
            for (path, name), *_ in step.parameters:
                return submodule(self._root, path)._parameters[name].dtype  # type: ignore[union-attr]
        return x.dtype

    def _check(self, x: Tensor, v: Tensor | None, sides: Sequence[Sequence[Any]] | None) -> Sequence[Sequence[Any]]:
        check_velocity(self.name, x, v)
        if x.is_complex():
            raise InputTypeError(f"{self.name}: x is complex ({x.dtype}), and the recurrence is for real numbers")
        for step in self._spec.steps:
            if isinstance(step.rule, Varies):
                raise OptionError(
                    f"{self.name}: gamma of block {step.name!r} is given by a module at each call of the model, so the "
                    "chain by itself is no one function. Momentumize the model with numbers for gamma"
                )
            if any(isinstance(side, (State, Escape)) for side in step.sides):
                raise BackwardError(
                    f"{self.name}: block {step.name!r} reads an earlier state or branch value of its own chain, which "
                    f"is not known from the end. Start a new chain there with exclude= of a block before it"
                )
        groups = tuple(() for _ in self.blocks) if sides is None else sides
        counts = tuple(len(group) for group in groups)
        if counts != self.side_counts:
            raise OptionError(
                f"{self.name}: its blocks take {list(self.side_counts)} values from outside the chain, not "
                f"{list(counts)}: give sides= as one sequence for each block"
            )
        return groups

    def _value(self, index: int, x: Tensor, sides: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """The branch's value, without side effects."""
        step = self._spec.steps[index]
        before = torch.get_rng_state() if step.draws else None
        with conditions_of(step, self._root, x).restored():
            value, *_ = step.again(self._root, x.to(dtype), *sides)
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise BackwardError(
                f"{self.name}: block {step.name!r} draws random numbers, which an inverse cannot draw again. Put the "
                "model into eval mode, or set dropout to 0"
            )
        return value


def chains(mm: nn.Module) -> tuple[Chain, ...]:
    """The chains of a momentumized model's latest capture, each with ``forward`` and ``inverse``.

    Args:
        mm: a momentumized model, a :class:`mfx.MomentumNet`, or a model with such parts.

    Returns:
        A :class:`Chain` for each chain, in order.

    Raises:
        InputTypeError: ``mm`` has no momentumized part.
        MfxError: the model has no captured graph yet (after unpickling, say): run it once.

    Example:
        >>> import torchvision, mfx
        >>> mm = mfx.momentumize(torchvision.models.resnet18(weights=None), gamma=0.9)
        >>> mfx.chains(mm)[0]
        <chain momentum_0: 2 blocks, layer1.0 to layer1.1>
    """
    return tuple(Chain(spec, mm.get_submodule(path)) for path, part in parts_of(mm).items() for spec in part.latest())
