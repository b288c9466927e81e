"""Layers of two residual adds, and any two-step recurrence over them in plain autograd: the second mind for rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from helpers import assert_same, run
from torch import Tensor, nn

import mfx

TOLERANCE = 1e-8
Branch = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """x + dropout(f(norm(x))), then x + g(x); all that draws or counts is alive."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.2)
        self.f, self.g = nn.Linear(width, width), nn.Linear(width, width)

    def attend(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.f(self.norm(x))))

    def feed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.g(x))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.feed(x)


class Net(nn.Module):
    """Layers in a list, of which the states after ``taps`` are handed out, too."""

    def __init__(self, depth: int = 4, width: int = 6, taps: Sequence[int] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head, self.taps = nn.Linear(width, 2), tuple(taps)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                taps.append(x)
        return [self.head(x), *taps]


class ByRule(nn.Module):
    """``v <- decay v + pull F(x), x <- x + v`` over a :class:`Net`, of which ``x + coast v`` is read.

    ``numbers`` are decay and pull, of all steps or of each; ``whole``: F is a layer less its x.
    """

    def __init__(self, net: Net, numbers: Any, *, whole: bool = False, coast: Any = 0.0, first: bool = False) -> None:
        super().__init__()
        self.net, self.whole, self.coast, self.first = net, whole, coast, first
        self.numbers = numbers

    def branches(self) -> Iterator[tuple[int, Branch]]:
        """Each branch, and the layer that it ends, or -1."""
        for index, layer in enumerate(self.net.layers):
            if self.whole:
                yield index, lambda x, layer=layer: layer(x) - x
            else:
                yield -1, layer.attend
                yield index, layer.feed

    def forward(self, x: Tensor) -> list[Tensor]:
        v, taps, out = torch.zeros_like(x), [], x
        for step, (layer, branch) in enumerate(self.branches()):
            decay, pull = self.numbers(step) if callable(self.numbers) else self.numbers
            decay, pull = (0.0, 1.0) if self.first and step == 0 else (decay, pull)
            v = decay * v + pull * branch(x)
            x = x + v
            coast = self.coast(step) if callable(self.coast) else self.coast
            out = x + coast * v
            if layer in self.net.taps:
                taps.append(out)
        return [self.net.head(out), *taps]


def named_as_the_net(result: Any) -> Any:
    """A result of :class:`ByRule` under the names of its net."""
    for group in (result.grads, result.buffers):
        own = {name.removeprefix("net."): value for name, value in group.items()}
        group.clear()
        group.update(own)
    return result


def x_of(net: nn.Module, batch: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 6, dtype=torch.float64, generator=generator).requires_grad_()


def both(net: Net, options: dict[str, Any], hand: ByRule, tolerance: float = TOLERANCE) -> nn.Module:
    """The momentumized net, whose reversible and stored runs are those of the recurrence by hand."""
    x = x_of(net)
    expected = named_as_the_net(run(hand, x))
    mm = mfx.momentumize(net, example_inputs=x, **options)
    found = run(mm, x)
    assert_same(found, expected, tolerance)
    stored = mfx.momentumize(net, example_inputs=x, reversible=False, **options)
    assert_same(run(stored, x), expected, tolerance)
    assert_same(found, run(stored, x), 1e-10)
    return mm
