"""From a plan and a budget in bytes to a plan that keeps to it."""

from mfx.budget.choose import within, without_budget

__all__ = ["within", "without_budget"]
