"""Gammas: what gives the gamma of each block of a chain at each call.

A factory is called once a chain, and gives a module from x_0 to the gammas of all its blocks: a tensor of one number a
block, shape (N,), or of one that broadcasts against x, shape (N, B, 1, ...) for one a sample; None is the plain
network.  Gradients reach what the module computes them from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import OptionError


@dataclass(frozen=True)
class LearnedGamma:
    """A factory for ``momentumize(gamma=...)``: one learned gamma a block, which begins at ``start``.

    ``gamma = sigmoid(r)`` with a parameter r of the model, ``momentum_gamma.<chain>.raw``.

    Raises:
        OptionError: ``start`` is not between 0 and 1.

    Example:
        >>> import torch, torchvision, mfx
        >>> model = torchvision.models.resnet18(weights=None)
        >>> mm = mfx.momentumize(model, gamma=mfx.LearnedGamma(0.9))
        >>> mm(torch.randn(2, 3, 64, 64)).sum().backward()
        >>> mm.momentum_gamma["0"].raw.grad.shape
        torch.Size([2])
    """

    start: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.start < 1:
            raise OptionError(f"start={self.start!r}: a learned gamma begins between 0 and 1, at 0.9, say")

    @property
    def typical(self) -> float:
        """What memory is foreseen by."""
        return self.start

    def __call__(self, chain: Any) -> nn.Module:
        return _Learned(len(chain.blocks), self.start)


class _Learned(nn.Module):
    def __init__(self, blocks: int, start: float) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((blocks,), math.log(start / (1 - start))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.raw)


@dataclass(frozen=True)
class RandomSign:
    """A factory for ``momentumize(gamma=...)``: ``+size`` or ``-size`` at random, for each sample and block.

    That is so in train mode; in eval mode the network is the plain one, which has the mean of both for gamma.

    Raises:
        OptionError: ``size`` is not above 0, or not below 1.

    Example:
        >>> import torch, torchvision, mfx
        >>> model = torchvision.models.resnet18(weights=None).eval()
        >>> mm = mfx.momentumize(model, gamma=mfx.RandomSign(0.5))
        >>> x = torch.randn(2, 3, 64, 64)
        >>> torch.equal(mm(x), model(x))
        True

    Source: Zhang, Lewis, Kleijn, "On Exact Bit-level Reversible Transformers Without Changing Architectures",
    arXiv 2407.09093.
    """

    size: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.size < 1:
            raise OptionError(f"size={self.size!r}: it must be above 0 and below 1, such as 0.5")

    @property
    def typical(self) -> float:
        """What memory is foreseen by."""
        return self.size

    def __call__(self, chain: Any) -> nn.Module:
        return _Sign(len(chain.blocks), self.size)


class _Sign(nn.Module):
    def __init__(self, blocks: int, size: float) -> None:
        super().__init__()
        self.blocks, self.size = blocks, size

    def forward(self, x: Tensor) -> Tensor | None:
        if not self.training:
            return None
        shape = (self.blocks, *x.shape[:1], *[1] * (x.dim() - 1))
        sign = torch.randint(0, 2, shape, device=x.device) * 2 - 1
        return sign * torch.full((), self.size, dtype=torch.get_default_dtype(), device=x.device)


@dataclass(eq=False)
class Given:
    """A factory for a tensor: of no dimension, one gamma for all; of one, one a block; of more, one that broadcasts
    against x.  A parameter is one of the model."""

    value: Tensor
    typical: float
    taken: int = 0

    def __call__(self, chain: Any) -> nn.Module:
        first = self.taken if self.value.dim() == 1 else 0
        self.taken += len(chain.blocks)
        return _Given(self.value, len(chain.blocks), first)

    def check(self) -> None:
        """Refuse other than one value for each block, once all chains are there."""
        if self.value.dim() == 1 and len(self.value) != self.taken:
            raise OptionError(
                f"gamma is a tensor of {len(self.value)} values, and {self.taken} blocks are rewritten: give one for "
                "each, in the order of the report; one value a sample broadcasts against x, and so has as many "
                "dimensions (gamma[:, None, None], say)"
            )


class _Given(nn.Module):
    def __init__(self, value: Tensor, blocks: int, first: int) -> None:
        super().__init__()
        self.blocks, self.first = blocks, first
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.value.dim() == 1:
            return self.value[self.first : self.first + self.blocks]
        return self.value.expand(self.blocks, *self.value.shape)
