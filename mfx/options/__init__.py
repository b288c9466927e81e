"""What the caller may ask for, checked at the door."""

from mfx.options.gammas import Gamma, check_gamma, gamma_of
from mfx.options.options import Options, Velocity, make_options
from mfx.options.patterns import Patterns, check_patterns
from mfx.options.rules import RuleName, check_rule, refuse_gamma
from mfx.options.sizes import Budget, Optimizer, check_bytes, check_optimizer

__all__ = [
    "Budget",
    "Gamma",
    "Optimizer",
    "Options",
    "Patterns",
    "RuleName",
    "Velocity",
    "check_bytes",
    "check_gamma",
    "check_optimizer",
    "check_patterns",
    "check_rule",
    "gamma_of",
    "make_options",
    "refuse_gamma",
]
