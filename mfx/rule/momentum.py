"""Momentum: the rule of Momentum ResNets, and its damped midpoint relatives.

    v <- gamma * v + (1 - gamma) * F(x)
    x <- x + v

gamma = 0 is the residual block itself; at gamma = 1 the velocity stays what it was.  Below 0 the velocity changes its
sign at each step: gamma = -1 is the midpoint rule, what lies between is damped.

- Inverse: ``x <- x - v``, ``v <- (v - (1 - gamma) F(x)) / gamma``; none at gamma = 0.
- Growth of an error, a step back: ``1 / |gamma|`` where F does not amplify.
- Exact arithmetic: ``log2(1 / |gamma|)`` bits a step; none at ``|gamma| = 1``, so that it needs no snapshot there.
- Readout: ``c = gamma / (1 - gamma)``, by which ``z' = z + F(x)``: the original network in z, whose branches read an x
  that lags by c blocks.

Reference: Sander, Ablin, Blondel, Peyre, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870,
equations (5) and (6).
Known limits: with gamma below 0 branches that pull x back (post-norm layers) make the recurrence unstable.
"""

from __future__ import annotations

from dataclasses import dataclass

from mfx.rule.base import Rule


@dataclass(frozen=True)
class Momentum(Rule):
    """The rule for one ``gamma`` in [-1, 1].

    >>> Momentum(0.9).decay, round(Momentum(0.9).pull, 3), Momentum(0.0).plain
    (0.9, 0.1, True)
    >>> round(Momentum(0.5).growth(0.0), 3), round(Momentum(0.5).growth(1.0), 3)
    (2.0, 3.414)
    >>> Momentum(0.5).coast, str(Momentum(0.5))
    (1.0, 'gamma 0.5')
    """

    gamma: float

    @property
    def decay(self) -> float:
        return self.gamma

    @property
    def pull(self) -> float:
        return 1 - self.gamma

    def __str__(self) -> str:
        return f"gamma {self.gamma:g}"
