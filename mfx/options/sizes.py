"""Sizes: bytes as callers write them, and optimizers, whose state has some."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch

from mfx.errors import InputTypeError, OptionError

Budget = int | float | str | None
Optimizer = str | Callable[[Any], torch.optim.Optimizer] | torch.optim.Optimizer | None

_SIZES = "bytes (an int), a text such as '8GB' or '512 MiB'"


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
