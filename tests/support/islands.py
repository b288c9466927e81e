"""Blocks whose Python does more than call operations: Functions of their own, modes switched for a part of a branch.

A block is its branch and an add, so that a hand-written recurrence can run the branches itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from nets import Net
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function


class Residual(nn.Module):
    """x + branch(x), with two linear layers, a norm and a dropout for the branch."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.25)

    def branch(self, x: Tensor) -> Tensor:
        """f(x)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x + f(x)."""
        return x + self.branch(x)


def of_branches(branch: Callable[[Any, Tensor], Tensor], depth: int = 3) -> Net:
    """A Net whose blocks have this branch."""
    torch.manual_seed(11)
    return Net(depth, block=type("Own", (Residual,), {"branch": branch}))


class ByHand(nn.Module):
    """What a momentumized Net has to compute: its blocks' own Python under the recurrence, stored by plain autograd."""

    def __init__(self, net: Net, gamma: float) -> None:
        super().__init__()
        self.stem, self.blocks, self.head, self.gamma = net.stem, net.blocks, net.head, gamma

    def forward(self, x: Tensor) -> Tensor:
        """The head's value."""
        return self.head(chain(self.blocks, self.stem(x), self.gamma))


def chain(blocks: Iterable[Any], x: Tensor, gamma: float) -> Tensor:
    """v <- gamma v + (1 - gamma) f(x), x <- x + v."""
    v = torch.zeros_like(x)
    for block in blocks:
        v = gamma * v + (1 - gamma) * block.branch(x)
        x = x + v
    return x


class Steps(Function):
    """Rounds to halves; the gradient passes through, scaled so that it is no other operation's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Half steps."""
        ctx.scale = scale
        return (2 * x).round() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Straight through."""
        return ctx.scale * grad, None


class Split(Function):
    """Positive part, negative part, and which is which, which has no gradient; with a context set up apart."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, names: tuple[str, ...] = ("up", "down")) -> Any:
        """Three values."""
        return x.clamp(min=0), x.clamp(max=0), (x > 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what backward needs."""
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, up: Tensor, down: Tensor, _: Any) -> Any:
        """Twice the right gradient for what is positive; none for the weight."""
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, 2 * up, down), None, None


class Lowered(Function):
    """A product that mixed precision runs in float32, by torch's own decorators."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Square."""
        ctx.save_for_backward(x)
        assert not torch.is_autocast_enabled("cpu")
        return x * x

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Half of what it is."""
        return grad * ctx.saved_tensors[0]


taken_before = Steps.apply
"""People keep ``apply`` under a name of their own."""


def straight_through(self: Any, x: Tensor) -> Tensor:
    """A rounding in the middle, called by a name from before."""
    return self.two(taken_before(torch.tanh(self.one(self.norm(x))), 0.5))


def parted(self: Any, x: Tensor) -> Tensor:
    """Several values, of which one has no gradient."""
    up, down, sign = Split.apply(self.dropout(self.one(x)), self.two.weight)
    return self.two(torch.maximum(up * sign, 0.1 * down))


def lowered(self: Any, x: Tensor) -> Tensor:
    """A Function with a forward of its own precision."""
    return self.two(Lowered.apply(torch.tanh(self.one(self.norm(x)))).to(x.dtype))


def gate_without_gradient(self: Any, x: Tensor) -> Tensor:
    """A gate that its layer does not learn from."""
    with torch.no_grad():
        gate = torch.sigmoid(self.two(self.norm(x)))
    return gate * self.dropout(self.one(x))


@torch.no_grad()
def _target(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        drawn = self.dropout(self.two(x))
    return drawn.tanh()


def gate_by_decorator(self: Any, x: Tensor) -> Tensor:
    """The same by a decorated method, with gradients switched on again inside."""
    return self.one(x) * _target(self, x)


def float32_inside(self: Any, x: Tensor) -> Tensor:
    """An island that autocast does not reach."""
    y = self.one(x)
    with torch.autocast("cpu", enabled=False):
        y = F.softmax(self.norm(y.float()), -1)
    return self.two(self.dropout(y))


def bfloat16_inside(self: Any, x: Tensor) -> Tensor:
    """An island of lower precision."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.tanh(self.one(x.float()))
    return self.two(y.to(x.dtype))
