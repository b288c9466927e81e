"""The tail of a chain: steps at its end that all keep their activations, of which nothing is undone."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, kept_bytes, run
from keeping import keeping
from nets import ConvNet, Net
from recurrence import NetByHand
from torch import Tensor, nn

import mfx

TAILS = [(), (5,), (3, 4, 5), (0, 3, 4, 5), (0, 1, 2, 3, 4, 5)]


class Lending(nn.Module):
    """A chain whose states are read by later blocks, and by others than blocks; dropout is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))
        self.drop = nn.Dropout(0.2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = [x]
        for number, layer in enumerate(self.layers):
            lent = states[max(number - 2, 0)]
            states.append(states[-1] + self.drop(torch.tanh(layer(states[-1]) * lent)))
        return states[-1], states[2].sin(), states[5].cos()


class LendingByHand(nn.Module):
    """The recurrence in plain autograd, where ``z`` with what is read out beside x."""

    def __init__(self, model: Lending, gamma: float, z: bool) -> None:
        super().__init__()
        self.layers, self.drop = model.layers, model.drop
        self.gamma, self.coast = gamma, gamma / (1 - gamma) if z else 0.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states, read, v = [x], [x], torch.zeros_like(x)
        for number, layer in enumerate(self.layers):
            lent = states[max(number - 2, 0)]
            v = self.gamma * v + (1 - self.gamma) * self.drop(torch.tanh(layer(states[-1]) * lent))
            states.append(states[-1] + v)
            read.append(states[-1] + self.coast * v)
        return read[-1], read[2].sin(), read[5].cos()


@pytest.mark.parametrize("steps", TAILS, ids=str)
@pytest.mark.parametrize("readout", ["x", "z"])
@pytest.mark.parametrize("gamma", [-0.5, 0.9])
def test_states_are_handed_over_to_the_tail_and_read_in_it(steps, readout, gamma):  # M13
    model, x = Lending(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mm = keeping(model, steps, gamma, readout=readout)
    assert_same(run(mm, x), run(LendingByHand(model, gamma, readout == "z"), x), 1e-9)


@pytest.mark.parametrize("steps", TAILS, ids=str)
@pytest.mark.parametrize("velocity", ["first", "zero"])
def test_the_first_velocity_reaches_the_tail(steps, velocity):
    model, x = Net(6), torch.randn(3, 4, dtype=torch.float64)
    stored = mfx.momentumize(model, 0.7, reversible=False, velocity=velocity)
    assert_same(run(keeping(model, steps, 0.7, velocity=velocity), x), run(stored, x))


@pytest.mark.parametrize("steps", TAILS, ids=str)
def test_a_tail_in_half_precision_carries_its_state_no_coarser_than_float32(steps):
    """60 steps of 1e-3, each far below half a unit of bfloat16 at 1, arrive all the same."""

    class Nudge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.full((8,), 1e-3, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.by.expand_as(x)

    depth = 10 * len(TAILS[-1])
    kept = [10 * step + n for step in steps for n in range(10)]
    mm = keeping(nn.Sequential(*(Nudge() for _ in range(depth))), kept, 0.5)
    x = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.testing.assert_close(mm(x).float(), torch.full((2, 8), 1 + 1e-3 * depth), rtol=1e-2, atol=0)


def test_where_all_is_kept_nothing_is_carried_finer_than_in_the_model():
    model, x = ConvNet(8).float(), torch.randn(4, 3, 16, 16)
    mm = mfx.momentumize(model, 0.9, example_inputs=x, activation_budget=1.0)
    run(mm, x)  # what is proven at a first call is no part of a step
    assert kept_bytes(mm, x) <= 1.01 * kept_bytes(model, x)
    assert_same(run(mm, x), run(NetOfImagesByHand(model, 0.9), x), 1e-4)


class NetOfImagesByHand(NetByHand):
    """The recurrence of a ConvNet."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        v = torch.zeros_like(x)
        for block in self.blocks:
            v = self.gamma * v + (1 - self.gamma) * (block(x) - x)
            x = x + v
        return self.head(x.mean((2, 3)))


def test_a_tail_has_its_gradient_twice_and_in_double_backward_says_what_does_instead():  # M7, M8
    model, x = Net(6).eval(), torch.randn(3, 4, dtype=torch.float64)
    loss = keeping(model, (4, 5))(x).square().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], [2 * grad for grad in once])
    with pytest.raises(mfx.BackwardError, match="reversible=False"):
        torch.autograd.grad(keeping(model, (4, 5))(x).sum(), [*model.parameters()], create_graph=True)


def test_where_all_blocks_are_alike_those_at_the_end_are_kept_and_the_report_says_so():
    model, x = Net(12, width=32), torch.randn(256, 4, dtype=torch.float64)
    report = mfx.report(model, x, gamma=0.9, activation_budget=0.5)
    kept = [row.name for row in report.blocks if row.treatment == "keep"]
    assert 2 < len(kept) < 10
    assert kept == [f"blocks.{number}" for number in range(12 - len(kept), 12)]
    assert report.chains[0].interval == 12 - len(kept)
