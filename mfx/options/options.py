"""What the caller may ask for, checked at the door.

:class:`Options` is the frozen value behind the keyword arguments of :func:`mfx.momentumize`,
:func:`mfx.report` and :func:`mfx.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from mfx.errors import OptionError
from mfx.options.gammas import Checked, Gamma, check_gamma, gamma_of, is_real
from mfx.options.patterns import Patterns, as_patterns
from mfx.options.rules import RuleName, check_rule
from mfx.options.sizes import Budget, check_budget
from mfx.rule import Momentum, Rule
from mfx.rule.varying import Varies

Velocity = str | Callable[[Any], nn.Module]

_STATE_DTYPES = ("auto", torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHOICES = {"capture": ("auto", "fx", "dynamo"), "readout": ("x", "z"), "granularity": ("add", "layer")}


@dataclass(frozen=True)
class Options:
    """The options of one rewriting; see :func:`mfx.momentumize` for their meaning.

    ``rule`` is None where ``gamma`` says it all.  ``layers`` are the paths of what stands in lists of modules, once a
    model is there, where ``granularity`` asks for them.
    ``kind`` and ``only_whole`` say what the named modules are, and whether there are other blocks (:mod:`mfx.find`);
    ``shapes`` whether shapes are known when planning; ``checked`` that each pattern has matched some block before.
    """

    gamma: Checked = 0.9
    rule: Rule | None = None
    readout: str = "x"
    granularity: str = "add"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    velocity: Velocity = "zero"
    reversible: bool = True
    state_dtype: torch.dtype | str = "auto"
    tolerance: float | None = None
    capture: str = "auto"
    activation_budget: int | float | None = None
    layers: tuple[str, ...] = ()
    shapes: bool = False
    kind: str = "wrapped"
    only_whole: bool = False
    checked: bool = False

    def named(self, paths: Iterable[str]) -> list[str]:
        """Those of the module ``paths`` that ``modules`` names."""
        return [path for path in paths if any(fnmatchcase(path, pattern) for pattern in self.modules)]

    def selects(self, name: str) -> bool:
        """Whether ``include`` and ``exclude`` let a block through."""
        wanted = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def rule_of(self, name: str) -> Rule | None:
        """The rule of a block: that of the first pattern of gamma that matches; None where none does."""
        if self.rule is not None:
            return self.rule
        gamma = gamma_of(self.gamma, name)
        if gamma is None:
            return None
        return Varies(gamma) if callable(self.gamma) else Momentum(gamma)

    @property
    def learned(self) -> bool:
        """Whether modules of the rewritten model's own give velocities or gammas."""
        return callable(self.velocity) or callable(self.gamma)

    def moves(self, name: str) -> bool:
        """Whether a block is another function than the model's own."""
        rule = self.rule_of(name)
        return rule is not None and not rule.plain


def make_options(
    gamma: Gamma = 0.9,
    *,
    rule: RuleName = "momentum",
    h: float | None = None,
    readout: str = "x",
    granularity: str = "add",
    include: Patterns = None,
    exclude: Patterns = None,
    modules: Patterns = None,
    velocity: Velocity = "zero",
    reversible: bool = True,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
    capture: str = "auto",
    activation_budget: Budget = None,
) -> Options:
    """Check each argument and freeze them."""
    _check_values(velocity, state_dtype, tolerance)
    _check_choices(capture=capture, readout=readout, granularity=granularity)
    checked, budget = check_gamma(gamma), check_budget(activation_budget)
    if callable(checked) and budget is not None:
        raise OptionError(
            f"activation_budget={activation_budget!r} does not go with a gamma that a tensor or a module gives: what "
            "is kept depends on its values. Leave one of them out"
        )
    return Options(
        gamma=checked,
        rule=check_rule(rule, h, gamma, readout),
        readout=readout,
        granularity=granularity,
        include=as_patterns("include", include),
        exclude=as_patterns("exclude", exclude),
        modules=as_patterns("modules", modules),
        velocity=velocity,
        reversible=bool(reversible),
        state_dtype=state_dtype,
        tolerance=tolerance,
        capture=capture,
        activation_budget=budget,
    )


def _check_choices(**given: Any) -> None:
    for argument, value in given.items():
        if value not in _CHOICES[argument]:
            raise OptionError(f"{argument} must be one of {', '.join(map(repr, _CHOICES[argument]))}, not {value!r}")


def _check_values(velocity: Any, state_dtype: Any, tolerance: Any) -> None:
    if not (velocity in ("zero", "first") if isinstance(velocity, str) else callable(velocity)):
        raise OptionError(
            f"velocity must be 'zero', 'first' or a factory velocity(chain) -> nn.Module, not {velocity!r}"
        )
    if state_dtype not in _STATE_DTYPES:
        raise OptionError(f"state_dtype must be 'auto' or a floating dtype, not {state_dtype!r}")
    if tolerance is not None and not (is_real(tolerance) and 0 < tolerance < 1):
        raise OptionError(f"tolerance must be a float between 0 and 1, or None, not {tolerance!r}")
