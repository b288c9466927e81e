"""Canvas: what all pictures share."""

from __future__ import annotations

import importlib
from typing import Any

from mfx.errors import OptionError

COLOURS = ("#3366cc", "#2a9d8f", "#d1662f", "#8a5fb0", "#b8860b", "#c2486b")
KEPT, INK = "#c4cad1", "#22313f"


def figure(width: float, height: float) -> Any:
    """An empty figure, that no window shows.

    Raises:
        OptionError: matplotlib is not installed.
    """
    try:
        kind = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise OptionError("pictures need matplotlib: pip install 'mfx[plot]'") from error
    return kind(figsize=(width, height), layout="constrained")


def colour_of(chain: int | None) -> str:
    """The colour of a chain's blocks, or of kept ones."""
    return KEPT if chain is None else COLOURS[chain % len(COLOURS)]


def bare(axes: Any, *sides: str) -> None:
    """Take lines away that say nothing."""
    axes.spines[list(sides)].set_visible(False)
