"""Varying: momentum whose gamma is known when it runs only: a learned value a block, or another one for each sample.

1. A plan has :class:`Varies` for such a block: a typical gamma, to foresee bytes by.
2. When a chain runs, :func:`varied` puts :class:`Varying` in its place, by the values that a module has given.
3. How the state is carried is decided by numbers: :class:`Between`, the bounds of these values.

The gradient of gamma, for ``g`` the sum of the gradients of x' and v', is ``<g, v - F(x)>``, summed to its shape.

Reference: gamma of +-0.5 at random is BDIA, Zhang, Lewis, Kleijn, arXiv 2407.09093.
Known limits: in values it depends on nothing of the chain but x_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mfx.errors import InputTypeError, OptionError, ShapeError
from mfx.rule.base import Rule
from mfx.rule.momentum import Momentum
from mfx.rule.step import StepSpec


@dataclass(frozen=True)
class Varies(Momentum):
    """Stands in a plan for a gamma that a module gives."""

    def __str__(self) -> str:
        return "gamma given by a module"


@dataclass(frozen=True)
class Between(Momentum):
    """The rule whose gamma is one of several, of which the one nearest to 0 is ``gamma``.

    >>> Between(0.5, (-0.5, 0.9)).bounds, Between(0.5, (-0.5, 0.9)).growth(0.0) == Momentum(0.5).growth(0.0)
    ((0.5, 0.9), True)
    """

    ends: tuple[float, float] = (0.0, 0.0)

    @property
    def plain(self) -> bool:
        return False

    @property
    def bounds(self) -> tuple[float, float]:
        return abs(self.gamma), max(map(abs, self.ends))

    def growth(self, gain: float) -> float:
        return max(Momentum(gamma).growth(gain) for gamma in (self.gamma, *self.ends))


@dataclass(frozen=True, eq=False)
class Varying(Rule):
    """Momentum with a tensor for gamma, which broadcasts against x; ``between`` are its bounds."""

    gamma: Tensor
    between: Between = Between(0.0)

    @property
    def decay(self) -> Tensor:  # type: ignore[override]
        return self.gamma

    @property
    def pull(self) -> Tensor:  # type: ignore[override]
        return 1 - self.gamma

    @property
    def coast(self) -> Tensor:  # type: ignore[override]
        return self.gamma / (1 - self.gamma)

    @property
    def plain(self) -> bool:
        return False

    @property
    def forgets(self) -> bool:
        return self.between.gamma == 0

    @property
    def scattered(self) -> bool:
        return self.gamma.dim() > 0

    @property
    def bounds(self) -> tuple[float, float]:
        return self.between.bounds

    def growth(self, gain: float) -> float:
        return self.between.growth(gain)

    @property
    def planned(self) -> Rule:
        return self.between

    def advance(self, x: Tensor, v: Tensor | None, branch: Tensor) -> tuple[Tensor, Tensor]:
        added = branch * self.pull.to(branch.dtype)
        v = added if v is None else v * self.gamma.to(v.dtype) + added
        return x + v, v

    def retreat(self, v: Tensor, branch: Tensor) -> Tensor:
        return (v - branch * self.pull.to(branch.dtype)) / self.gamma.to(v.dtype)


def varied(
    name: str, steps: tuple[StepSpec, ...], gammas: Tensor | None, x: Tensor, known: bool = True
) -> tuple[StepSpec, ...]:
    """The steps of chain ``name`` with the ``gammas`` that a module gave for its input x; None is the plain network.

    Where values are not ``known``, as in what becomes a graph, the state is carried as planned.

    Raises:
        InputTypeError: they are no tensor of floating numbers.
        ShapeError: they are not one for each block, or do not broadcast against x.
        OptionError: a value is outside of [-1, 1).
    """
    if gammas is None:
        return _with_rules(steps, [Momentum(0.0)] * len(steps))
    _check(name, steps, gammas, x)
    ends = _ends(name, steps, gammas) if known else [Between(step.rule.decay) for step in steps]
    if not gammas.requires_grad and known and not any(end.gamma or any(end.ends) for end in ends):
        return _with_rules(steps, [Momentum(0.0)] * len(steps))
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    values = gammas.to(wide).unbind(0)
    return _with_rules(steps, [Varying(gamma, end) for gamma, end in zip(values, ends, strict=True)])


def _ends(name: str, steps: tuple[StepSpec, ...], gammas: Tensor) -> list[Between]:
    """The bounds of the values of each step."""
    flat = gammas.detach().reshape(len(steps), -1).double()
    nearest = flat.gather(1, flat.abs().argmin(1, keepdim=True))[:, 0]
    found = torch.stack([flat.amin(1), flat.amax(1), nearest]).tolist()
    for step, low, high in zip(steps, *found[:2], strict=True):
        if not (low >= -1 and high < 1):
            value = high if not high < 1 else low
            raise OptionError(
                f"{name}: gamma of block {step.name!r} is {value:g}: what gives it must keep it in [-1, 1), by "
                "torch.sigmoid or a clamp, say"
            )
    return [Between(near, (low, high)) for low, high, near in zip(*found, strict=True)]


def gammas_of(steps: tuple[StepSpec, ...]) -> list[Tensor | None]:
    """The gamma of each step, where that is a tensor."""
    return [step.rule.gamma if isinstance(step.rule, Varying) else None for step in steps]


def by_values(steps: tuple[StepSpec, ...]) -> tuple[StepSpec, ...]:
    """The steps with the values that their gammas have now, without history: backward is by those of its forward."""
    return tuple(
        replace(step, rule=replace(step.rule, gamma=step.rule.gamma.detach().clone()))
        if isinstance(step.rule, Varying)
        else step
        for step in steps
    )


def _with_rules(steps: tuple[StepSpec, ...], rules: Sequence[Rule]) -> tuple[StepSpec, ...]:
    """The steps with other rules where theirs stands for one; a first step that is plain stays so."""
    pairs = zip(steps, rules, strict=True)
    return tuple(replace(step, rule=rule) if isinstance(step.rule, Varies) else step for step, rule in pairs)


def _check(name: str, steps: tuple[StepSpec, ...], gammas: Tensor, x: Tensor) -> None:
    if not isinstance(gammas, Tensor) or not gammas.is_floating_point():
        what = f"a tensor of {gammas.dtype}" if isinstance(gammas, Tensor) else type(gammas).__name__
        raise InputTypeError(f"{name}: gamma must be a tensor of floating numbers, or None, not {what}")
    shape, rest = tuple(gammas.shape), tuple(gammas.shape[1:])
    if not shape or shape[0] != len(steps):
        raise ShapeError(
            f"{name}: gamma has shape {shape}, and must have one entry for each of its {len(steps)} blocks"
        )
    fits = len(rest) in (0, x.dim()) and all(a in (1, b) for a, b in zip(rest, x.shape, strict=False))
    if not fits:
        sample = (*x.shape[:1], *[1] * (x.dim() - 1))
        raise ShapeError(
            f"{name}: gamma of a block has shape {rest}, and x has {tuple(x.shape)}: it must be one number, or "
            f"broadcast against x; one value a sample is of shape {sample}"
        )


def gradient_of_gamma(shape: torch.Size, total: Tensor, v: Tensor | None, branch: Tensor) -> Tensor:
    """That of gamma, from the sum of the gradients of x' and v', from v and F(x)."""
    apart = -branch if v is None else v - branch
    return (total * apart.to(total.dtype)).sum_to_size(shape)
