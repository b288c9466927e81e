"""Shells of modules whose class torch has generated (parametrizations), which refuse to be copied by ``copy.copy``."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, run
from nets import Block, Net, rows
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import mfx
from mfx.model.parts import parts_of

GAMMA = 0.9


class Judged(Net):
    """Asks for values before a stack that is captured by itself; what is beside it has normed weights."""

    def __init__(self) -> None:
        super().__init__(4, p=0.0)
        self.stem = weight_norm(self.stem)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 1e9:
            x = -x
        return self.head(self.blocks(x))


class Weighed(Net):
    """A weight of its own has a parametrization, so that the root's class is a generated one."""

    def __init__(self) -> None:
        super().__init__(4, p=0.0)
        self.scale = nn.Parameter(torch.rand(6, 6, dtype=torch.float64))
        weight_norm(self, "scale")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) @ self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def recurrence(model: Net, x: Tensor) -> Tensor:
    """The momentum net by plain autograd."""
    x = model.stem(x) @ model.scale if isinstance(model, Weighed) else model.stem(x)
    v = torch.zeros_like(x)
    for block in model.blocks:
        v = GAMMA * v + (1 - GAMMA) * (block(x) - x)
        x = x + v
    return model.head(x)


@pytest.mark.parametrize(("kind", "owners"), [(Judged, ["blocks"]), (Weighed, [""])])
@pytest.mark.parametrize("gamma", [0.0, GAMMA])
def test_a_model_with_parametrized_weights_is_rewritten_around_them(
    kind: type[Net], owners: list[str], gamma: float
) -> None:
    torch.manual_seed(0)
    model, x = kind(), rows()
    mm = mfx.momentumize(model, gamma, example_inputs=x)
    assert list(parts_of(mm)) == owners
    assert isinstance(mm, kind)
    names = [name for name, _ in model.named_parameters()]
    expected = torch.autograd.grad(
        (recurrence(model, x) if gamma else model(x)).square().sum(), list(model.parameters())
    )
    got = torch.autograd.grad(mm(x).square().sum(), list(mm.parameters()))
    for name, ours, theirs in zip(names, got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)


def test_a_block_that_holds_a_parametrized_weight_is_still_a_block() -> None:
    torch.manual_seed(0)
    model, x = Net(3, p=0.0), rows()
    for block in model.blocks:
        assert isinstance(block, Block)
        weight_norm(block.up)
    mm = mfx.momentumize(model, GAMMA)
    expected = torch.autograd.grad(recurrence(model, x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(mm(x).square().sum(), list(mm.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_model_keeps_its_parametrizations() -> None:
    model = Weighed()
    mm = mfx.momentumize(model, GAMMA)
    assert torch.nn.utils.parametrize.is_parametrized(mm, "scale")
    assert list(mm.state_dict()) == list(model.state_dict())
    mfx.set_gamma(mm, 0.0)
    x = rows()
    assert_same(run(mm, x), run(model, x))
