"""Kept: steps that keep their activations within a chain that is run backwards."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, run
from keeping import keeping
from nets import ConvNet, Net
from torch import Tensor, nn

import mfx


@pytest.mark.parametrize("steps", [(0,), (4,), (1, 2), (1, 3, 4), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kept_steps_are_those_of_the_stored_run(steps, gamma, dtype):  # M2, M5, M6
    for model, x in ((Net(5), torch.randn(3, 4)), (ConvNet(5), torch.randn(2, 3, 5, 5))):
        model, x = model.to(dtype), x.to(dtype).requires_grad_()
        stored = mfx.momentumize(model, gamma, reversible=False)
        assert_same(run(keeping(model, steps, gamma), x), run(stored, x), 1e-10 if dtype is torch.float64 else 1e-4)


def test_kept_steps_survive_two_backwards():  # M7
    model, x = Net(5).eval(), torch.randn(3, 4, dtype=torch.float64)
    loss = keeping(model, (1, 3))(x).square().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], [2 * grad for grad in once])


def test_a_kept_value_changed_in_place_is_refused():  # M8
    model, x = Net(3), torch.randn(3, 4, dtype=torch.float64)
    values = []
    model.blocks[1].down.register_forward_hook(lambda module, given, value: values.append(value))
    loss = keeping(model, (1,))(x).sum()
    values[-1].detach().mul_(2)
    with pytest.raises(mfx.BackwardError, match=r"the value of block 'blocks\.1' was changed in place"):
        loss.backward()


def test_learned_first_velocities_get_their_gradient_from_a_kept_first_step():
    model, x = Net(3), torch.randn(3, 4, dtype=torch.float64)
    results = []
    for steps in ((), (0,), (0, 1, 2)):
        torch.manual_seed(0)
        results.append(run(keeping(model, steps, velocity=lambda chain: nn.Linear(6, 6).double()), x))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


class Gives(nn.Module):
    """A block with dropout alive, which hands out a value from inside and reads the one of the block before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor, lent: Tensor) -> tuple[Tensor, Tensor]:
        given = self.drop(torch.tanh(self.a(x)))
        return x + self.b(given * lent), given


class Giving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gives() for _ in range(4))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        given, lent = [], torch.ones_like(x)
        for block in self.blocks:
            x, lent = block(x, lent)
            given.append(lent)
        return x, given


def by_hand(model: Giving, gamma: float, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The recurrence in plain autograd."""
    v, given, lent = torch.zeros_like(x), [], torch.ones_like(x)
    for block in model.blocks:
        y, lent = block(x, lent)
        v = gamma * v + (1 - gamma) * (y - x)
        x = x + v
        given.append(lent)
    return x, given


@pytest.mark.parametrize("steps", [(0,), (1,), (3,), (1, 2), (2, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_values_from_inside_have_their_whole_gradient_beside_kept_steps(steps, gamma):  # M13
    model, x = Giving(), torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    found = []
    for call in (keeping(model, steps, gamma), lambda x: by_hand(model, gamma, x)):
        torch.manual_seed(1)
        out, given = call(x)
        seen: dict[int, Tensor] = {}
        for number, value in enumerate(given):
            value.register_hook(lambda grad, seen=seen, number=number: seen.update({number: grad.clone()}))
        loss = out.square().sum() + given[2].sin().sum()
        grads = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
        alone = torch.autograd.grad(loss, given)
        found.append([*grads, *alone, *(seen[number] for number in sorted(seen))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
