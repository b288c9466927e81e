"""Gammas: gamma as callers give it, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import nn

from mfx.errors import InputTypeError, OptionError
from mfx.rule.gammas import Given

Gamma = float | Mapping[str, float] | torch.Tensor | Callable[[Any], nn.Module]
Checked = float | tuple[tuple[str, float], ...] | Callable[[Any], nn.Module]


def check_gamma(gamma: Any) -> Checked:
    """``gamma`` as a float in [-1, 1), as (pattern, float) pairs, or as a factory of modules."""
    if isinstance(gamma, torch.Tensor):
        return _given(gamma)
    if callable(gamma):
        return gamma  # type: ignore[return-value]
    if isinstance(gamma, Mapping):
        if not gamma:
            raise OptionError("gamma is an empty mapping: give at least one pattern, such as {'*': 0.9}")
        return tuple((str(pattern), _gamma_value(value, f"gamma[{pattern!r}]")) for pattern, value in gamma.items())
    return _gamma_value(gamma, "gamma")


def _given(gamma: torch.Tensor) -> Given:
    """A factory for the values of a tensor."""
    if not gamma.is_floating_point() or not gamma.numel():
        raise InputTypeError(
            f"gamma is a tensor of {gamma.dtype} and shape {tuple(gamma.shape)}: give floating numbers"
        )
    values = gamma.detach().double()
    for value in (values.min().item(), values.max().item()):
        _gamma_value(value, "a value of gamma")
    return Given(gamma, values.abs().min().item())


def typical_gamma(gamma: Checked) -> float:
    """What stands for a gamma that a factory gives, where memory is foreseen."""
    return float(getattr(gamma, "typical", 0.9))


def gamma_of(gamma: Checked, name: str) -> float | None:
    """What ``gamma`` gives the block ``name``."""
    if callable(gamma):
        return typical_gamma(gamma)
    if not isinstance(gamma, tuple):
        return gamma
    return next((value for pattern, value in gamma if fnmatchcase(name, pattern)), None)


def _gamma_value(value: Any, argument: str) -> float:
    if not is_real(value):
        raise InputTypeError(
            f"{argument} must be a float in [-1, 1) or a mapping from block-name pattern to float, "
            f"not {type(value).__name__} ({value!r})"
        )
    if math.isnan(value):
        raise OptionError(f"{argument} is NaN; it must be a float in [-1, 1)")
    if value < -1:
        raise OptionError(
            f"{argument}={value!r}: below -1 the velocity grows at every block; give a float in [-1, 1), such as 0.9"
        )
    if value >= 1:
        raise OptionError(
            f"{argument}={value!r}: at gamma >= 1 the velocity never takes in the branches "
            "(v <- gamma * v + (1 - gamma) * f(x)), so nothing would be learned; give a float in [-1, 1), such as 0.9"
        )
    return float(value)


def is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
