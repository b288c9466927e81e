"""Midpoint: the explicit midpoint rule for the differential equation x' = F(x), with step 1.

    v <- -v + 2 * F(x)                 that is    x_{k+1} = x_{k-1} + 2 F(x_k)
    x <- x + v

It is momentum at gamma = -1.

- Inverse: ``x <- x - v``, ``v <- 2 F(x) - v``: undoing divides by nothing.
- Growth of an error, a step back: 1 where F does not amplify.
- Exact arithmetic: no bits are lost, so two states suffice at any depth and in any precision, without a snapshot.
- First velocity: 0 makes x_1 = x_0 + 2 F_0(x_0); ``velocity="first"`` makes it x_0 + F_0(x_0), an Euler step, by which
  the rule is of second order.
- Readout: ``z = x - v / 2``, the mean of the last two states.

Reference: Zhao et al., "Re2TAL", CVPR 2023, arXiv 2211.14053; Gal et al., "Reversing Large Language Models for
Efficient Training and Fine-Tuning", arXiv 2512.02056.
Known limits: it is stable for branches that turn x, and weakly unstable for those that pull it back (post-norm layers).
"""

from __future__ import annotations

from dataclasses import dataclass

from mfx.rule.base import Rule


@dataclass(frozen=True)
class Midpoint(Rule):
    """x_{k+1} = x_{k-1} + 2 F(x_k).

    >>> Midpoint().decay, Midpoint().pull, Midpoint().coast, Midpoint().growth(0.0)
    (-1.0, 2.0, -0.5, 1.0)
    """

    @property
    def decay(self) -> float:
        return -1.0

    @property
    def pull(self) -> float:
        return 2.0

    def __str__(self) -> str:
        return "midpoint"
