"""Gammas: gamma as callers give it, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from mfx.errors import InputTypeError, OptionError

Gamma = float | Mapping[str, float]


def check_gamma(gamma: Any) -> float | tuple[tuple[str, float], ...]:
    """``gamma`` as a float in [-1, 1), or as (pattern, float) pairs."""
    if isinstance(gamma, Mapping):
        if not gamma:
            raise OptionError("gamma is an empty mapping: give at least one pattern, such as {'*': 0.9}")
        return tuple((str(pattern), _gamma_value(value, f"gamma[{pattern!r}]")) for pattern, value in gamma.items())
    return _gamma_value(gamma, "gamma")


def gamma_of(gamma: float | tuple[tuple[str, float], ...], name: str) -> float | None:
    """What ``gamma`` gives the block ``name``."""
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
