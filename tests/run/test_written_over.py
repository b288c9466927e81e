"""A state in exact arithmetic is written over where nobody else has it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, run
from nets import Block, Net
from torch import Tensor, nn

import mfx


class Lending(nn.Module):
    """Blocks that read earlier states, of which one is handed out, too."""

    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states = [x]
        for layer in self.layers:
            states.append(states[-1] + torch.tanh(layer(states[-1]) * states[max(len(states) - 3, 0)]))
        return states[-1], states[4].sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_that_later_blocks_read_stay_what_they_are(dtype):
    model, x = Lending().to(dtype), torch.randn(5, 6).to(dtype).requires_grad_()
    finer = torch.float32 if dtype is torch.bfloat16 else torch.float64
    assert mfx.report(model, x.detach(), gamma=0.9, state_dtype=finer).chains[0].rounding > 0
    both = (mfx.momentumize(model, 0.9, state_dtype=finer, reversible=reversible) for reversible in (True, False))
    found = [run(mm, x) for mm in both]
    for name, value in found[1].outputs.items():
        assert torch.equal(found[0].outputs[name], value), name
    assert relative_error(found[0].grads, found[1].grads) < (1e-5 if dtype is torch.float32 else 2e-2)


def test_kept_states_serve_a_second_backward():  # M7
    """In float32 at gamma 0.5 a state is kept every few steps."""
    model, x = Net(60, p=0.0).float(), torch.randn(3, 4)
    mm = mfx.momentumize(model, 0.5)
    loss = mm(x).square().sum()
    assert mfx.report(model, x, gamma=0.5).chains[0].snapshots
    first = torch.autograd.grad(loss, [*mm.parameters()], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, [*mm.parameters()])))


class Forked(nn.Module):
    """Python looks at each x, so that blocks are linked; one x goes on in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(p=0.0) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks[:3]:
            if not x.isnan().any():
                x = block(x)
        return self.blocks[4](self.blocks[3](x)), self.blocks[5](x)


class ForkedByHand(nn.Module):
    """The recurrence in plain autograd."""

    def __init__(self, model: Forked, gamma: float) -> None:
        super().__init__()
        self.blocks, self.gamma = model.blocks, gamma

    def step(self, number: int, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = self.gamma * v + (1 - self.gamma) * (self.blocks[number](x) - x)
        return x + v, v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.zeros_like(x)
        for number in range(3):
            x, v = self.step(number, x, v)
        return self.step(4, *self.step(3, x, v))[0], self.step(5, x, v)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_state_from_which_two_chains_go_on_is_the_same_for_both(dtype):
    model, x = Forked().to(dtype), torch.randn(5, 6, dtype=dtype, requires_grad=True)
    mm = mfx.momentumize(model, 0.9, example_inputs=x.detach(), state_dtype=torch.float64)
    found, expected = run(mm, x), run(ForkedByHand(model, 0.9), x)
    allowed = 1e-5 if dtype is torch.float32 else 1e-10
    assert relative_error(found.outputs, expected.outputs) < allowed
    assert relative_error(found.grads, expected.grads) < allowed
