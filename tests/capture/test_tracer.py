"""What the tracer records that plain fx symbolic tracing would lose."""

from __future__ import annotations

import pytest
import torch
from graphs import case, found, net
from helpers import assert_same, run

import mfx

X = torch.randn(3, 4, dtype=torch.float64)


def calls(forward, **parts):
    return [node.name for node in found(forward, parts).flow.nodes if node.op == "call_function"]


def add_and_scale(self, x):
    y = self.f(x)
    y += 1
    y *= 2
    y -= x
    y /= 3
    return y


def test_augmented_assignment_is_recorded_as_a_write():
    assert calls(add_and_scale) == ["iadd", "imul", "isub", "itruediv"]


def test_augmented_assignment_of_numbers_is_recorded_as_the_new_number_it_makes():
    def forward(self, x):
        rows = x.size(0)
        both = rows
        both += x.shape[1]
        return self.f(x).view(rows, -1), torch.zeros(both)

    assert not [name for name in calls(forward) if name.startswith("iadd")]


def old_name_sees_the_write(self, x):
    x = self.g(x)
    old = x.view(-1)
    x += 1
    return old, x + self.f(x)


def rebound_number(self, x):
    rows = before = x.size(0)
    rows *= 4
    return (x + self.f(x)).view(rows), torch.zeros(before)


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("another name of a tensor sees a write to it", old_name_sees_the_write),
        case("another name of a number keeps the old one", rebound_number),
    ],
)
def test_names_mean_what_they_mean_in_python(forward, parts):
    model = net(forward, **parts)
    assert_same(run(mfx.momentumize(model, gamma=0.0), X), run(model, X))


def test_a_generator_of_the_users_own_is_used_and_moves_on():
    model = net(lambda self, x: x + self.f(x), own=torch.Generator())
    type(model).forward = lambda self, x: self.g(x + self.f(x)) * torch.rand(4, generator=self.own)
    mm = mfx.momentumize(model)
    model.own.manual_seed(3)
    first, second = mm(X), mm(X)
    model.own.manual_seed(3)
    assert torch.equal(mm(X), first)
    assert not torch.equal(first, second)


def test_writing_to_a_tensor_that_tracing_would_freeze_is_an_error():
    def forward(self, x):
        total = torch.zeros(3, 4, dtype=torch.float64)
        total += x + self.f(x)
        return total

    with pytest.raises(mfx.CaptureError, match=r"writes in place .*new_zeros"):
        mfx.momentumize(net(forward), capture="fx")


def test_writing_to_a_tensor_made_from_an_input_is_fine():
    def forward(self, x):
        total = torch.zeros_like(x)
        total += x + self.f(x)
        return total

    model = net(forward)
    mm = mfx.momentumize(model, gamma=0.0)
    assert_same(run(mm, X), run(model, X))
    assert_same(run(mm, X), run(model, X))
