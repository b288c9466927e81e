"""What the caller may ask for, checked at the door.

:class:`Options` is the frozen value behind the keyword arguments of :func:`mfx.momentumize`,
:func:`mfx.report` and :func:`mfx.verify`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from mfx.errors import InputTypeError, OptionError

Gamma = float | Mapping[str, float]
Patterns = str | Iterable[str] | None
Velocity = str | Callable[[Any], nn.Module]
Budget = int | float | str | None
Optimizer = str | Callable[[Any], torch.optim.Optimizer] | torch.optim.Optimizer | None

_STATE_DTYPES = ("auto", torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CAPTURES = ("auto", "fx", "dynamo")


@dataclass(frozen=True)
class Options:
    """The options of one rewriting; see :func:`mfx.momentumize` for their meaning.

    ``kind`` and ``only_whole`` say what the named modules are, and whether there are other blocks (:mod:`mfx.find`);
    ``shapes`` whether shapes are known when planning; ``checked`` that each pattern has matched some block before.
    """

    gamma: float | tuple[tuple[str, float], ...] = 0.9
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    velocity: Velocity = "zero"
    reversible: bool = True
    state_dtype: torch.dtype | str = "auto"
    tolerance: float | None = None
    capture: str = "auto"
    activation_budget: int | float | None = None
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

    def gamma_of(self, name: str) -> float | None:
        """The gamma of a block: the first pattern that matches; None where none does."""
        return gamma_of(self.gamma, name)


def gamma_of(gamma: float | tuple[tuple[str, float], ...], name: str) -> float | None:
    """What ``gamma`` gives the block ``name``."""
    if not isinstance(gamma, tuple):
        return gamma
    return next((value for pattern, value in gamma if fnmatchcase(name, pattern)), None)


def make_options(
    gamma: Gamma = 0.9,
    *,
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
    if not (velocity in ("zero", "first") if isinstance(velocity, str) else callable(velocity)):
        raise OptionError(
            f"velocity must be 'zero', 'first' or a factory velocity(chain) -> nn.Module, not {velocity!r}"
        )
    if state_dtype not in _STATE_DTYPES:
        raise OptionError(f"state_dtype must be 'auto' or a floating dtype, not {state_dtype!r}")
    if tolerance is not None and not (_is_real(tolerance) and 0 < tolerance < 1):
        raise OptionError(f"tolerance must be a float between 0 and 1, or None, not {tolerance!r}")
    if capture not in _CAPTURES:
        raise OptionError(f"capture must be one of {', '.join(map(repr, _CAPTURES))}, not {capture!r}")
    return Options(
        gamma=check_gamma(gamma),
        include=_patterns("include", include),
        exclude=_patterns("exclude", exclude),
        modules=_patterns("modules", modules),
        velocity=velocity,
        reversible=bool(reversible),
        state_dtype=state_dtype,
        tolerance=tolerance,
        capture=capture,
        activation_budget=check_budget(activation_budget),
    )


def check_budget(budget: Any) -> int | float | None:
    """A budget as bytes (int) or as a fraction (float in [0, 1]).

    >>> check_budget("1.5 GiB"), check_budget("8GB"), check_budget(0.5)
    (1610612736, 8000000000, 0.5)
    """
    if budget is None:
        return None
    ways = f"{_SIZES}, or a float in [0, 1], a fraction of what plain backprop needs"
    if isinstance(budget, Real) and not isinstance(budget, (bool, Integral)):
        if not 0 <= float(budget) <= 1:
            raise OptionError(
                f"activation_budget={budget!r} is a float outside of [0, 1], where it stands for a fraction: "
                f"give {ways}"
            )
        return float(budget)
    return check_bytes("activation_budget", budget, ways)


_SIZES = "bytes (an int), a text such as '8GB' or '512 MiB'"


def check_bytes(argument: str, size: Any, ways: str = _SIZES) -> int:
    """A size in bytes, from a number or a text.

    >>> check_bytes("memory", "80 GB"), check_bytes("memory", 4096)
    (80000000000, 4096)
    """
    asked = f"{argument}={size!r}"
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", size.lower())
        if found is None:
            raise OptionError(f"{asked} cannot be read: give {ways}")
        number, prefix, binary = found.groups()
        return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))
    if not isinstance(size, Integral) or isinstance(size, bool):
        raise InputTypeError(f"{asked} is a {type(size).__name__}: give {ways}")
    if size < 0:
        raise OptionError(f"{asked} is negative: give {ways}")
    return int(size)


def check_optimizer(optimizer: Any) -> Any:
    """An optimizer, or what makes one of parameters; a text names a class of ``torch.optim``.

    >>> check_optimizer("adamw")
    <class 'torch.optim.adamw.AdamW'>
    """
    base = torch.optim.Optimizer
    if isinstance(optimizer, str):
        kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
        kinds = {name: kind for name, kind in kinds.items() if issubclass(kind, base) and kind is not base}
        found = {name.lower(): kind for name, kind in kinds.items()}.get(optimizer.lower())
        if found is None:
            near = difflib.get_close_matches(optimizer, kinds, n=3, cutoff=0.3) or sorted(kinds)
            raise OptionError(f"optimizer={optimizer!r} is no class of torch.optim; near names: {', '.join(near)}")
        return found
    if optimizer is None or callable(optimizer) or isinstance(optimizer, base):
        return optimizer
    raise InputTypeError(
        f"optimizer={optimizer!r} is a {type(optimizer).__name__}: give a class of torch.optim or its name ('AdamW'), "
        "a callable that makes one of parameters, or an optimizer of the model"
    )


def check_gamma(gamma: Any) -> float | tuple[tuple[str, float], ...]:
    """``gamma`` as a float in [0, 1), or as (pattern, float) pairs."""
    if isinstance(gamma, Mapping):
        if not gamma:
            raise OptionError("gamma is an empty mapping: give at least one pattern, such as {'*': 0.9}")
        return tuple((str(pattern), _gamma_value(value, f"gamma[{pattern!r}]")) for pattern, value in gamma.items())
    return _gamma_value(gamma, "gamma")


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str], what: str = "block") -> None:
    """Refuse patterns that match none of ``names``, listing near ones."""
    names = list(names)
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:5]
        listed = f"; near names: {', '.join(map(repr, near))}" if near else f"; there is no {what} at all"
        raise OptionError(f"{argument}={pattern!r} matches no {what}{listed}")


def _gamma_value(value: Any, argument: str) -> float:
    if not _is_real(value):
        raise InputTypeError(
            f"{argument} must be a float in [0, 1) or a mapping from block-name pattern to float, "
            f"not {type(value).__name__} ({value!r})"
        )
    if math.isnan(value):
        raise OptionError(f"{argument} is NaN; it must be a float in [0, 1)")
    if value < 0:
        raise OptionError(
            f"{argument}={value!r} is negative: the velocity would change sign at every block; give a float in [0, 1)"
        )
    if value >= 1:
        raise OptionError(
            f"{argument}={value!r}: at gamma >= 1 the velocity never takes in the branches "
            "(v <- gamma * v + (1 - gamma) * f(x)), so nothing would be learned; give a float in [0, 1), such as 0.9"
        )
    return float(value)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    if patterns is None:
        return ()
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = (patterns,)
    listed = tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise InputTypeError(f"{argument} takes fnmatch patterns (str), not {type(pattern).__name__} ({pattern!r})")
    return listed
