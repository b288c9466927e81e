"""Momentum: the rule of Momentum ResNets.

    v <- gamma * v + (1 - gamma) * F(x)
    x <- x + v

gamma = 0 is the residual block itself; at gamma = 1 the velocity stays what it was.

Reference: Sander, Ablin, Blondel, Peyre, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870,
equations (5) and (6).
"""

from __future__ import annotations

from dataclasses import dataclass

from mfx.rule.base import Rule


@dataclass(frozen=True)
class Momentum(Rule):
    """The rule for one ``gamma`` in [0, 1].

    >>> Momentum(0.9).decay, round(Momentum(0.9).pull, 3), Momentum(0.0).plain
    (0.9, 0.1, True)
    >>> round(Momentum(0.5).growth(0.0), 3), round(Momentum(0.5).growth(1.0), 3)
    (2.0, 3.414)
    """

    gamma: float

    @property
    def decay(self) -> float:
        return self.gamma

    @property
    def pull(self) -> float:
        return 1 - self.gamma

    @property
    def starting(self) -> Momentum:
        # gamma F + (1 - gamma) F = F, so v_0 need not be computed.
        return Momentum(0.0)
