"""Rule: what one step of a chain does to its state (x, v), and how that is undone.

Every rule is two numbers, ``decay`` and ``pull``::

    v' = decay * v + pull * F(x)            advance
    x' = x + v'

    x  = x' - v'                            x_before
    v  = (v' - pull * F(x)) / decay         retreat

and so are its gradients: with ``g = grad_x' + grad_v'``, those of F(x) and v are ``pull * g`` and ``decay * g``.  A
*plain* step (decay 0, pull 1) is the residual block itself; v is lost there, so it cannot be undone.

Contracts, which the tests hold every rule to: ``retreat(v', F) == v`` and ``x_before(x', v') == x`` up to rounding for
``(x', v') = advance(x, v, F)``; the cotangents are those of autograd through ``advance``; ``growth`` bounds, step by
step, an error that is carried backwards.  A new rule is a subclass in a file of its own.

Reference: eliminating v, ``x_{k+1} = (1 + decay) x_k - decay x_{k-1} + pull F(x_k)``, which is the form that two-step
reversible networks are published in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule(ABC):
    """The rule of one step; a frozen value that can be hashed."""

    @property
    @abstractmethod
    def decay(self) -> float:
        """The share of the velocity that survives the step."""

    @property
    @abstractmethod
    def pull(self) -> float:
        """The factor of the branch, and of its gradient."""

    @property
    def starting(self) -> Rule:
        """The rule of a chain's first step where velocity="first": the step acts like the plain block, v_1 = F_0(x_0).

        That is v_0 = F_0(x_0) where decay + pull = 1.
        """
        return Plain()

    @property
    def coast(self) -> float | None:
        """c of the readout ``z = x + c v``: where x would come to rest without further branches; None where it never
        does.

        ``c = decay + decay^2 + ... = decay / (1 - decay)``, and ``z' = z + pull / (1 - decay) F(x)`` for each step.
        """
        return None if self.decay == 1 else self.decay / (1 - self.decay)

    @property
    def plain(self) -> bool:
        """Whether the step is the residual block itself."""
        return self.decay == 0 and self.pull == 1

    @property
    def forgets(self) -> bool:
        """Whether the velocity before the step is lost in it."""
        return self.decay == 0

    @property
    def scattered(self) -> bool:
        """Whether its numbers differ from element to element of x."""
        return False

    @property
    def bounds(self) -> tuple[float, float]:
        """How much of the velocity survives the step at least, and at most (:mod:`mfx.rule.varying`)."""
        return self.decay, self.decay

    @property
    def planned(self) -> Rule:
        """The rule by which the carrying of the state is planned; it can be hashed, and compared."""
        return self

    def advance(self, x: Tensor, v: Tensor | None, branch: Tensor) -> tuple[Tensor, Tensor]:
        """(x', v') from (x, v) and F(x); ``v`` None stands for zero."""
        v = branch * self.pull if v is None else torch.add(v * self.decay, branch, alpha=self.pull)
        return x + v, v

    def x_before(self, x: Tensor, v: Tensor) -> Tensor:
        """x from (x', v')."""
        return x - v

    def retreat(self, v: Tensor, branch: Tensor) -> Tensor:
        """v from v' and F(x)."""
        return torch.sub(v, branch, alpha=self.pull).div_(self.decay)

    def growth(self, gain: float) -> float:
        """By which factor undoing a step may amplify an error of the state, where F amplifies by ``gain``.

        The largest absolute eigenvalue, for J = gain and J = -gain, of::

            e_x <- e_x - e_v,    e_v <- (e_v - pull J e_x) / decay
        """
        if self.decay == 0:
            return math.inf
        determinant = 1 / self.decay
        largest = 0.0
        for slope in (gain, -gain):
            trace = 1 + (1 + self.pull * slope) / self.decay
            square = trace * trace - 4 * determinant
            real = (abs(trace) + math.sqrt(square)) / 2 if square >= 0 else math.sqrt(determinant)
            largest = max(largest, real)
        return largest


@dataclass(frozen=True)
class Plain(Rule):
    """The residual block itself: v' = F(x), x' = x + F(x)."""

    @property
    def decay(self) -> float:
        return 0.0

    @property
    def pull(self) -> float:
        return 1.0

    def __str__(self) -> str:
        return "plain"
