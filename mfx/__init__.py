"""mfx: momentum residual networks as a compiler pass for PyTorch."""

from mfx.errors import (
    BackwardError,
    CaptureError,
    HookWarning,
    InputTypeError,
    MfxError,
    MfxWarning,
    NothingRewrittenWarning,
    OptionError,
    PlanChangedError,
    Reason,
    ShapeError,
)
from mfx.model import graph_of, momentumize, set_gamma

__all__ = [
    "BackwardError",
    "CaptureError",
    "HookWarning",
    "InputTypeError",
    "MfxError",
    "MfxWarning",
    "NothingRewrittenWarning",
    "OptionError",
    "PlanChangedError",
    "Reason",
    "ShapeError",
    "graph_of",
    "momentumize",
    "set_gamma",
]
