"""The small residual models that the hand-made cases share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + down(dropout(gelu(up(norm(x)))))."""

    def __init__(self, width: int = 6, p: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(p)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """A stem, one chain of blocks, a head."""

    def __init__(self, depth: int = 3, width: int = 6, block: Any = Block, **given: Any) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Linear(4, width)
        self.blocks = nn.Sequential(*(block(width, **given) for _ in range(depth)))
        self.head = nn.Linear(width, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """The head's value."""
        return self.head(self.blocks(self.stem(x)))


class ConvBlock(nn.Module):
    """x + conv(dropout(relu(bn(x)))), the dropout functional."""

    def __init__(self, width: int = 6, p: float = 0.2) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.drop_prob = p

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.dropout(F.relu(self.bn(x)), self.drop_prob, self.training))


class ConvNet(nn.Module):
    """A convolution, one chain of blocks, a mean over the pixels."""

    def __init__(self, depth: int = 3, width: int = 6, block: Any = ConvBlock, **given: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(block(width, **given) for _ in range(depth)))
        self.head = nn.Linear(width, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """The head's value."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def rows(count: int = 5) -> Tensor:
    """Input for a Net."""
    return torch.randn(count, 4, dtype=torch.float64, requires_grad=True)


def images(count: int = 4, size: int = 5) -> Tensor:
    """Input for a ConvNet."""
    return torch.randn(count, 3, size, size, dtype=torch.float64, requires_grad=True)
