"""Leapfrog: the leapfrog rule for x'' = F(x), with step h.

    v <- v + h^2 * F(x)                that is    x_{k+1} = 2 x_k - x_{k-1} + h^2 F(x_k)
    x <- x + v

- Inverse: ``x <- x - v``, ``v <- v - h^2 F(x)``: undoing divides by nothing.
- Growth of an error, a step back: 1 where F does not amplify (it grows with the steps, and no faster).
- Exact arithmetic: no bits are lost, so two states suffice at any depth and in any precision, without a snapshot.
- First velocity: 0, or F_0(x_0) for ``velocity="first"``.
- Readout: x alone; nothing slows it down, so there is no z.

Reference: Chang et al., "Reversible Architectures for Arbitrarily Deep Residual Neural Networks", AAAI 2018,
arXiv 1709.03698, section 3; Gal et al., arXiv 2512.02056.
Known limits: the velocity sums up all branches, so x grows with the square of the depth if they agree; choose h of the
order of 1 / depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from mfx.errors import OptionError
from mfx.rule.base import Rule


@dataclass(frozen=True)
class Leapfrog(Rule):
    """x_{k+1} = 2 x_k - x_{k-1} + h^2 F(x_k).

    >>> Leapfrog(0.5).decay, Leapfrog(0.5).pull, Leapfrog(0.5).coast, Leapfrog(0.5).growth(0.0)
    (1.0, 0.25, None, 1.0)
    """

    h: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.h, Real) or isinstance(self.h, bool) or not math.isfinite(self.h) or self.h <= 0:
            raise OptionError(
                f"h={self.h!r}: the step of the leapfrog rule must be a finite number above 0, such as 0.5"
            )

    @property
    def decay(self) -> float:
        return 1.0

    @property
    def pull(self) -> float:
        return float(self.h) ** 2

    def __str__(self) -> str:
        return f"leapfrog, h {self.h:g}"
