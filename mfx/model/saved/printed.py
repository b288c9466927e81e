"""Described: what is momentum in a module, and by which options, for who prints the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from mfx.options import gamma_of, make_options


def described(side: Any) -> Iterator[str]:
    """A line for each chain of a momentum side, and one for the options that are not as usual; none without a side."""
    if side is None or side.chains is None:
        return
    for chain in side.chains:
        learned = callable(side.options.gamma)
        gammas = (
            ["learned"] if learned else list(dict.fromkeys(str(gamma_of(side.options.gamma, name)) for name in chain))
        )
        shown = gammas[0] if len(gammas) == 1 else f"{gammas[0]} to {gammas[-1]}"
        blocks = f"1 block ({chain[0]})" if len(chain) == 1 else f"{len(chain)} blocks ({chain[0]} to {chain[-1]})"
        yield f"momentum: {blocks}, gamma={shown}"
    others = ", ".join(f"{name}={value!r}" for name, value in _unusual(side.options))
    if others and side.chains:
        yield f"momentum options: {others}"


def _unusual(options: Any) -> Iterator[tuple[str, Any]]:
    """The options, but for gamma and how the model is captured, that differ from their defaults."""
    for name, one in inspect.signature(make_options).parameters.items():
        value, usual = getattr(options, name, None), one.default
        same = (
            value is None
            or value is usual
            or (isinstance(value, (str, int, float, tuple)) and (value or None) == (usual or None))
        )
        if name not in ("gamma", "capture") and not same:
            yield name, value
