"""Dropped: what autograd saves is made anew by a second run, which ends with the last of it and is held against the
first."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import mfx
from mfx.run.uninverted.dropped import dropping

OFF = []


def told(off, dtype):
    OFF.append((float(off), dtype))


@pytest.fixture(autouse=True)
def _nothing_told():
    OFF.clear()


def parts(count=3, width=5):
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count)).double()
    return layers, torch.randn(4, width, dtype=torch.float64, requires_grad=True)


def composed(layers, x, scale=1.0):
    for layer in layers:
        x = torch.tanh(layer(x)) * scale
    return x


def test_gradients_are_those_of_the_function_and_nothing_was_off():
    layers, x = parts()

    def function(x):
        return composed(layers, x)

    plain = torch.autograd.grad(function(x).sum(), [x, *layers.parameters()])
    found = torch.autograd.grad(dropping("f", function, function, [x], told).sum(), [x, *layers.parameters()])
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert [(0.0, torch.float64)] == OFF


def test_the_second_run_ends_with_the_last_that_is_saved():
    layers, x = parts()
    seen = []

    def again(x):
        seen.append("begins")
        y = composed(layers, x)
        seen.append("ends")
        return y + 1

    def first(x):
        return composed(layers, x) + 1

    dropping("f", first, again, [x], told).sum().backward()
    assert seen == ["begins"]


def test_one_graph_may_be_gone_through_several_times():
    layers, x = parts()

    def function(x):
        return composed(layers, x)

    plain = torch.autograd.grad(function(x).sum(), x)
    y = dropping("f", function, function, [x], told).sum()
    for _ in range(3):
        torch.testing.assert_close(torch.autograd.grad(y, x, retain_graph=True), plain, rtol=0, atol=0)
    assert len(OFF) == 3


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (
            lambda layers, x: composed(layers[:2], x),
            r"f: .*saves nothing more where it saved .*\(4, 5\)",
        ),
        (
            lambda layers, x: composed(layers, x[:2]),
            r"f: .*saves .*\(2, 5\).*where it saved .*\(4, 5\)",
        ),
    ],
    ids=["less", "other shapes"],
)
def test_a_function_that_saves_something_else_is_an_error(again, message):
    layers, x = parts()
    y = dropping("f", lambda x: composed(layers, x), lambda x: again(layers, x), [x], told)
    with pytest.raises(mfx.BackwardError, match=message):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(4, 5), (3000, 50), (3, 2, 9000, 5), (3, 100_000, 1)], ids=str)
def test_a_function_with_other_values_is_told(shape):
    """Also where a sample of them is looked at."""
    layers, _ = parts(width=shape[-1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for again, off in ((1.5, True), (1.0, False)):
        OFF.clear()
        y = dropping("f", lambda x: composed(layers, x), lambda x: composed(layers, x, again), [x], told)  # noqa: B023
        y.sum().backward()
        assert (OFF[0][0] > 1e-3) is off
        assert off or OFF[0][0] == 0


def test_a_difference_in_one_row_is_told_after_as_many_turns_as_rows_are_left_out():
    x = torch.randn(3000, 50, dtype=torch.float64, requires_grad=True)
    one = torch.ones(3000, 1, dtype=torch.float64)
    one[1235] = 100.0
    for _ in range(4):
        dropping("f", torch.exp, lambda x: torch.exp(x + one.log()), [x], told).sum().backward()
    assert max(off for off, _ in OFF) > 1e-3


def test_an_input_that_is_changed_in_between_is_an_error():  # M8
    layers, x = parts()
    y = x * 1
    z = dropping("f", lambda y: composed(layers, y), lambda y: composed(layers, y), [y], told)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(mfx.BackwardError, match=r"an input of f was changed in place"):
        z.sum().backward()


class Exponential:
    """A function whose last node saves its own result."""

    def __init__(self, layers):
        self.layers = layers
        self.inside = []

    def __call__(self, x):
        y = composed(self.layers, x).exp()
        self.inside.append(weakref.ref(y))
        return y


@pytest.mark.parametrize("asked", ["all", "x alone", "twice", "never"])
def test_nothing_is_left_behind(asked):  # M14
    layers, x = parts()
    first, again = Exponential(layers), Exponential(layers)
    inside, function = [first.inside, again.inside], weakref.ref(again)
    gc.collect()
    gc.disable()
    try:
        y = dropping("f", first, again, [x], told)
        del again
        if asked == "all":
            y.sum().backward()
        elif asked == "x alone":
            torch.autograd.grad(y.sum(), x)
        elif asked == "twice":
            torch.autograd.grad(y.sum(), layers[2].bias, retain_graph=True)
            torch.autograd.grad(y.sum(), layers[0].bias, retain_graph=True)
        assert (function() is None) == (asked not in ("twice", "never"))
        del y
        assert function() is None
        assert all(reference() is None for references in inside for reference in references)
    finally:
        gc.enable()
