"""M5: a normalization that is called as a function moves its running statistics once, by whatever name it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recurrence import ByHand
from torch import Tensor, nn

import mfx

aten = torch.ops.aten
CALLS: dict[str, Callable[..., Tensor]] = {
    "F": lambda m, h: F.batch_norm(h, m.mean, m.var, m.scale, m.shift, True),
    "F by keyword": lambda m, h: F.batch_norm(h, training=True, running_var=m.var, running_mean=m.mean),
    "torch": lambda m, h: torch.batch_norm(h, m.scale, m.shift, m.mean, m.var, True, 0.1, 1e-5, False),
    "native": lambda m, h: torch.native_batch_norm(h, m.scale, m.shift, m.mean, m.var, True, 0.1, 1e-5)[0],
    "aten": lambda m, h: aten.batch_norm(h, m.scale, m.shift, m.mean, m.var, True, 0.1, 1e-5, False),
    "overload": lambda m, h: aten.batch_norm.default(h, m.scale, m.shift, m.mean, m.var, True, 0.1, 1e-5, False),
    "by schema": lambda m, h: aten._native_batch_norm_legit(h, m.scale, m.shift, m.mean, m.var, True, 0.1, 1e-5)[0],
    "instance": lambda m, h: torch.instance_norm(
        torch.stack([h, h.sin(), h.cos()], -1), m.scale, m.shift, m.mean, m.var, True, 0.1, 1e-5, False
    ).sum(-1),
}


class Block(nn.Module):
    """x + drop(norm(f(x)))."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call, self.f, self.drop = call, nn.Linear(4, 4), nn.Dropout(0.2)
        self.scale, self.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.call(self, self.f(x)))


def steps(each: nn.Module, model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Gradients and buffers after two steps in train mode, since a second shows what the first left."""
    torch.manual_seed(1)
    for _ in range(2):
        each(x).square().sum().backward()
    return [[p.grad for p in model.parameters() if p.grad is not None], list(model.buffers())]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize(
    "options",
    [{}, {"capture": "dynamo"}, {"modules": "?"}, {"activation_budget": 0.0}],
    ids=["fx", "dynamo", "whole", "budget"],
)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_and_statistics_are_those_of_the_recurrence(name: str, options: dict[str, Any], gamma: float):
    x = torch.randn(6, 4, dtype=torch.float64)
    model = nn.Sequential(*(Block(CALLS[name]) for _ in range(3))).double()
    other = copy.deepcopy(model)
    given = {} if options in ({}, {"modules": "?"}) else {"example_inputs": x}
    mm = mfx.momentumize(model, gamma, **options, **given)
    torch.testing.assert_close(steps(mm, model, x), steps(ByHand(other, gamma), other, x), rtol=1e-9, atol=1e-10)
