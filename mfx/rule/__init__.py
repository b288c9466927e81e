"""The mathematics of one step, on tensors alone: the rule, its arithmetic, its precision."""

from mfx.rule.base import Rule
from mfx.rule.momentum import Momentum
from mfx.rule.snapshots import Schedule, schedule
from mfx.rule.step import StepSpec

__all__ = ["Momentum", "Rule", "Schedule", "StepSpec", "schedule"]
