"""From what was found and what was asked to what will run, and how.  Pure; the plan is a frozen value."""

from mfx.plan.chain import Chain, Forecast, Plan, Way
from mfx.plan.planner import plan, with_options

__all__ = ["Chain", "Forecast", "Plan", "Way", "plan", "with_options"]
