"""mfx: momentum residual networks as a compiler pass for PyTorch."""

from mfx.anneal import GammaSchedule
from mfx.backend import Backend, backend
from mfx.errors import (
    BackwardError,
    CaptureError,
    CompiledStoredWarning,
    CompileError,
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
from mfx.inverse import Chain, chains
from mfx.model import graph_of, momentumize
from mfx.momentumnet import MomentumNet
from mfx.parts import drift, set_gamma
from mfx.report import Report, report
from mfx.transform import transform_to_momentumnet
from mfx.verify import ChainVerification, Verification, verify

__all__ = [
    "Backend",
    "BackwardError",
    "CaptureError",
    "Chain",
    "ChainVerification",
    "CompileError",
    "CompiledStoredWarning",
    "DriftWarning",
    "GammaSchedule",
    "HookWarning",
    "InputTypeError",
    "MfxError",
    "MfxWarning",
    "MomentumNet",
    "NothingRewrittenWarning",
    "OptionError",
    "PlanChangedError",
    "Reason",
    "Report",
    "ShapeError",
    "Verification",
    "backend",
    "chains",
    "drift",
    "graph_of",
    "momentumize",
    "report",
    "set_gamma",
    "transform_to_momentumnet",
    "verify",
]
