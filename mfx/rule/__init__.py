"""The mathematics of one step, on tensors alone: the rule, its arithmetic, its precision."""

from mfx.rule.arithmetic import Schedule, schedule
from mfx.rule.base import Rule
from mfx.rule.gammas import LearnedGamma, RandomSign
from mfx.rule.leapfrog import Leapfrog
from mfx.rule.midpoint import Midpoint
from mfx.rule.momentum import Momentum
from mfx.rule.step import StepSpec

__all__ = ["Leapfrog", "LearnedGamma", "Midpoint", "Momentum", "RandomSign", "Rule", "Schedule", "StepSpec", "schedule"]
