"""mfx: momentum residual networks as a compiler pass for PyTorch."""

from importlib.metadata import version as _version

from mfx.compile import Backend, backend
from mfx.errors import (
    BackwardError,
    CaptureError,
    CheckpointingWarning,
    CompileError,
    DriftWarning,
    EntryError,
    HookWarning,
    InputTypeError,
    MfxError,
    MfxWarning,
    NothingRewrittenWarning,
    OptionError,
    PlanChangedError,
    Reason,
    ShapeError,
    StaleGammaWarning,
)
from mfx.integrations import from_pretrained
from mfx.memory import kept_bytes
from mfx.model import Chain, GammaSchedule, chains, drift, graph_of, momentumize, set_gamma
from mfx.momentumnet import MomentumNet, transform_to_momentumnet
from mfx.rule import Leapfrog, LearnedGamma, Midpoint, Momentum, RandomSign, Rule
from mfx.view import ChainVerification, Fit, Report, Verification, fit, report, verify

__version__ = _version("mfx")

__all__ = [
    "Backend",
    "BackwardError",
    "CaptureError",
    "Chain",
    "ChainVerification",
    "CheckpointingWarning",
    "CompileError",
    "DriftWarning",
    "EntryError",
    "Fit",
    "GammaSchedule",
    "HookWarning",
    "InputTypeError",
    "Leapfrog",
    "LearnedGamma",
    "MfxError",
    "MfxWarning",
    "Midpoint",
    "Momentum",
    "MomentumNet",
    "NothingRewrittenWarning",
    "OptionError",
    "PlanChangedError",
    "RandomSign",
    "Reason",
    "Report",
    "Rule",
    "ShapeError",
    "StaleGammaWarning",
    "Verification",
    "__version__",
    "backend",
    "chains",
    "drift",
    "fit",
    "from_pretrained",
    "graph_of",
    "kept_bytes",
    "momentumize",
    "report",
    "set_gamma",
    "transform_to_momentumnet",
    "verify",
]
