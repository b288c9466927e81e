"""The peak that is foreseen for a step, against the allocator's of the same step."""

from __future__ import annotations

import pytest
import torch
from peaks import allocated_peak
from torch import nn

import mfx
from mfx.budget.step import peak_of


def stack(width, depth, last=None):
    layers = [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)]
    return nn.Sequential(*layers, *([] if last is None else [last]))


class WithLoss(nn.Module):
    """Gives its loss and what it is computed from, as language models do."""

    def __init__(self):
        super().__init__()
        self.body = stack(64, 2, nn.Linear(64, 1024))

    def forward(self, x):
        scores = self.body(x)
        return scores.logsumexp(-1).mean(), scores


def held_to_the_end(model, x):
    output = model(x)
    loss = output[0] if isinstance(output, tuple) else (output * 1).sum()
    loss.backward()


@pytest.mark.parametrize("make", [lambda: stack(64, 4), lambda: stack(64, 1, nn.Linear(64, 1024)), WithLoss])
def test_the_peak_of_a_step_is_that_of_the_allocator(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(256, 64)
    held_to_the_end(model, x)  # gradients exist from here on
    graph = torch.fx.symbolic_trace(model).graph
    found = peak_of(graph, model, [x])
    assert found.bytes == pytest.approx(allocated_peak(lambda: held_to_the_end(model, x)), rel=0.02)


def test_inputs_of_which_only_shapes_are_known_foresee_the_same_step():
    model, x = stack(64, 4), torch.randn(256, 64)
    graph = torch.fx.symbolic_trace(model).graph
    found = peak_of(graph, model, [x])
    assert found.bytes > 0
    assert peak_of(graph, model, [x.to("meta")]) == found
    given = [mfx.report(model, one, activation_budget=0.0).forecast for one in (x, x.to("meta"))]
    assert given[0] == given[1]


class Passed(torch.autograd.Function):
    """x as it is; gives its operand no gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Unasked(nn.Linear):
    def forward(self, x):
        return passed(super().forward(x), self.scale)


def passed(x, weight):
    return Passed.apply(x, weight)


torch.fx.wrap("passed")


def test_a_parameter_that_an_operation_gives_no_gradient_has_none():
    model = Unasked(8, 8)
    model.scale = nn.Parameter(torch.ones(1024))
    found = peak_of(torch.fx.symbolic_trace(model).graph, model, [torch.randn(4, 8)])
    assert 0 < found.with_gradients < 1024 * 4
