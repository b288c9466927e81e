"""Chains of separately captured modules that go on from one another in one call."""

from mfx.run.linked.joint import Joint, Start, joint_of, within

__all__ = ["Joint", "Start", "joint_of", "within"]
