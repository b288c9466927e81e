"""The recurrence over the very same blocks, in plain autograd: ``F(x) = block(x) - x``, buffers and draws included."""

from __future__ import annotations

import torch
from helpers import Result, run
from nets import Net
from torch import Tensor, nn


class ByHand(nn.Module):
    """``v <- gamma v + (1 - gamma) F(x), x <- x + v``."""

    def __init__(self, blocks: nn.Sequential, gamma: float) -> None:
        super().__init__()
        self.blocks, self.gamma = blocks, gamma

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for block in self.blocks:
            v = self.gamma * v + (1 - self.gamma) * (block(x) - x)
            x = x + v
        return x


def by_hand(blocks: nn.Sequential, gamma: float, x: Tensor) -> Result:
    """What the momentumized ``blocks`` have to give for x, by their own names."""
    result = run(ByHand(blocks, gamma), x)
    for named in (result.grads, result.buffers):
        own = {name.removeprefix("blocks."): value for name, value in named.items()}
        named.clear()
        named.update(own)
    return result


class NetByHand(nn.Module):
    """The recurrence of a Net in plain autograd; the very same modules, under the very same names."""

    def __init__(self, model: Net, gamma: float) -> None:
        super().__init__()
        self.stem, self.blocks, self.head, self.gamma = model.stem, model.blocks, model.head, gamma

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        v = torch.zeros_like(x)
        for block in self.blocks:
            v = self.gamma * v + (1 - self.gamma) * (block(x) - x)
            x = x + v
        return self.head(x)
