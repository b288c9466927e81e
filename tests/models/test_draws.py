"""Draws between blocks, in train mode only: what two blocks read, and what ends a chain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, chain_names, run
from torch import Tensor, nn

import mfx


class Conditioned(nn.Module):
    """A label is dropped at random once, and two residual adds read what is made of it (DiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.g, self.drop = nn.Linear(2, 8), nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.3)

    def scales(self, c: Tensor) -> tuple[Tensor, ...]:
        if self.training:
            c = torch.where(torch.rand(c.shape[0], 1, dtype=c.dtype) < 0.4, torch.zeros_like(c), c)
        return self.e(c).chunk(2, -1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        p, q = self.scales(c)
        x = x + self.drop(self.f(x * p))
        return x + self.drop(self.g(x * q))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module], n: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(n)).double()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


class ByHand(nn.Module):
    def __init__(self, net: nn.Module, gamma: float) -> None:
        super().__init__()
        self.blocks, self.gamma = net.blocks, gamma

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for block in self.blocks:
            for f, scale in zip((block.f, block.g), block.scales(c), strict=True):
                v = self.gamma * v + (1 - self.gamma) * block.drop(f(x * scale))
                x = x + v
        return x


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, c = (torch.randn(6, n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    return x, c


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_a_draw_that_two_blocks_read_is_a_part_of_the_first(capture, gamma):
    net = Net(Conditioned)
    mm = mfx.momentumize(net, gamma, example_inputs=inputs(), capture=capture)
    assert [len(chain) for chain in chain_names(mm)] == [6]
    assert_same(run(mm, *inputs()), run(ByHand(net, gamma), *inputs()), 1e-10)
    mm.eval()
    assert_same(run(mm, *inputs()), run(ByHand(net, gamma), *inputs()), 1e-10)


class Between(nn.Module):
    """In train mode something else is drawn between the blocks, and the order of draws keeps them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = x + F.dropout(self.f(x), 0.3, self.training)
        c = c * torch.rand_like(c) if self.training else c
        return x + F.dropout(self.g(x), 0.3, self.training), c


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_evaluation_takes_over_the_chains_of_the_capture_in_train_mode(capture):
    """One function in both modes: in evaluation alone the two blocks would be one chain."""
    torch.manual_seed(0)
    net = Between().double()
    mm = mfx.momentumize(net, 0.8, example_inputs=inputs(), capture=capture)
    assert [len(chain) for chain in chain_names(mm)] == [1, 1]
    mm.eval()
    x, c = inputs()
    y = x + 0.2 * net.f(x)
    expected = y + 0.2 * net.g(y)
    torch.testing.assert_close(mm(x, c)[0], expected)
    assert [len(chain.blocks) for chain in mfx.report(net.eval(), inputs(), capture=capture).chains] == [2]


def test_a_first_capture_in_evaluation_cannot_be_followed_by_one_in_train_mode_that_differs():
    torch.manual_seed(0)
    net = Between().double().eval()
    mm = mfx.momentumize(net, 0.8, example_inputs=inputs(), capture="dynamo")
    with pytest.raises(mfx.PlanChangedError, match="at first it was in the chain"):
        mm.train()(*inputs())
