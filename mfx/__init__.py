"""mfx: momentum residual networks as a compiler pass for PyTorch."""

from mfx.errors import (
    BackwardError,
    CaptureError,
    DriftWarning,
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
from mfx.report import Report, report
from mfx.verify import Verification, verify

__all__ = [
    "BackwardError",
    "CaptureError",
    "DriftWarning",
    "HookWarning",
    "InputTypeError",
    "MfxError",
    "MfxWarning",
    "NothingRewrittenWarning",
    "OptionError",
    "PlanChangedError",
    "Reason",
    "Report",
    "ShapeError",
    "Verification",
    "graph_of",
    "momentumize",
    "report",
    "set_gamma",
    "verify",
]
