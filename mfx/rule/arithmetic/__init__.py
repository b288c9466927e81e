"""The arithmetic of a chain's state: in which dtype it is carried, how it is undone, and where it is kept."""

from mfx.rule.arithmetic.snapshots import Schedule, schedule

__all__ = ["Schedule", "schedule"]
