"""Layers: what the blocks of a described model are made of, by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FunctionalBatchNorm(nn.Module):
    """Batch norm by the function, told by ``self.training``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, training=self.training)


class FunctionalDropout(nn.Module):
    """Dropout by the function, told by ``self.training``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class StraightThrough(torch.autograd.Function):
    """To the next quarter; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Rounded(nn.Module):
    """Rounding by the custom function."""

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x)


class Gate(nn.Module):
    """A gate that is computed without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(x)
        return x * gate


class AutocastIsland(nn.Module):
    """A layer that runs under an autocast of its own, or under none."""

    def __init__(self, width: int, enabled: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, self.enabled):
            value = self.linear(x.to(self.linear.weight.dtype))
        return value.to(x.dtype)


class TanhInPlace(nn.Module):
    """An activation that writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh_()


def layer(name: str, width: int) -> nn.Module:
    """One layer by its name."""
    return {
        "linear": lambda: nn.Linear(width, width),
        "relu": nn.ReLU,
        "relu_in_place": lambda: nn.ReLU(inplace=True),
        "tanh": nn.Tanh,
        "tanh_in_place": TanhInPlace,
        "norm": lambda: nn.LayerNorm(width),
        "batch_norm": lambda: nn.BatchNorm1d(width),
        "functional_batch_norm": lambda: FunctionalBatchNorm(width),
        "dropout": lambda: nn.Dropout(0.3),
        "dropout_in_place": lambda: nn.Dropout(0.3, inplace=True),
        "functional_dropout": FunctionalDropout,
        "rounded": Rounded,
        "gate": Gate,
        "autocast_off": lambda: AutocastIsland(width, False),
        "autocast_on": lambda: AutocastIsland(width, True),
    }[name]()
