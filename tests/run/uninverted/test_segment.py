"""Segment: operations outside of chains run a second time as they ran first, and only as far as needed."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mfx
from mfx.graph.notes import STATE

pytestmark = pytest.mark.filterwarnings("ignore::mfx.NothingRewrittenWarning")


class Stem(nn.Module):
    """Two convolutions that change the shape, with all that a second run could get wrong."""

    def __init__(self, p=0.5):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout2d(p)
        self.second = nn.Conv2d(8, 16, 3, stride=2)
        self.double()

    def forward(self, x):
        x = torch.relu_(self.norm(self.first(x)))
        return self.second(self.drop(x)).mean((2, 3))


def recomputing(model, x):
    mm = mfx.momentumize(model, 0.0, example_inputs=x, activation_budget=0.0)
    assert mm.__dict__[STATE].latest_entry().passed.plan.segments, "nothing would be tested"
    return mm


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_masks_are_drawn_once_and_statistics_move_once(x):  # M5, M6
    model = Stem()
    before = model.norm.running_mean.clone()
    result = run(recomputing(model, x), x)
    assert_same(result, run(model, x))
    assert not torch.equal(result.buffers["norm.running_mean"], before)


def test_two_backwards_and_two_forwards_before_one_backward_are_right(x):  # M7
    model = Stem(p=0.0)
    mm = recomputing(model, x)
    for one in (model, mm):
        model.zero_grad()
        y, z = one(x).square().sum(), one(2 * x).sum()
        z.backward(retain_graph=True)
        y.backward()
        z.backward()
        found = [parameter.grad for parameter in model.parameters()]
        if one is model:
            expected = found
    torch.testing.assert_close(found, expected)


def test_second_derivatives_are_those_of_the_model(x):
    model = Stem(p=0.0).eval()
    gradients = []
    for one in (model, recomputing(model, x).eval()):
        (first,) = torch.autograd.grad(one(x).square().sum(), model.first.weight, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), model.second.weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_parameters_changed_in_between_are_refused(x):  # M8
    model = Stem()
    loss = recomputing(model, x)(x).sum()
    with torch.no_grad():
        model.first.weight.mul_(2)
    with pytest.raises(mfx.BackwardError, match="parameter was changed in place"):
        loss.backward()


def test_parameters_given_other_values_in_between_are_refused(x):  # M8
    model = Stem()
    loss = recomputing(model, x)(x).sum()
    model.first.weight.data = model.first.weight.data * 2
    with pytest.raises(mfx.BackwardError, match="parameter 'weight' of Conv2d was given other values"):
        loss.backward()


def test_inputs_changed_in_between_are_refused(x):  # M8
    loss = recomputing(Stem(), x)(x).sum()
    x.mul_(2)
    with pytest.raises(mfx.BackwardError, match="changed in place between forward and backward"):
        loss.backward()


def test_parameters_of_a_functional_call_are_those_of_the_second_run(x):  # M15
    model = Stem(p=0.0)
    mm = recomputing(model, x)
    given = {name: (value * 1.5).detach().requires_grad_() for name, value in model.named_parameters()}
    found = []
    for one in (model, mm):
        loss = torch.func.functional_call(one, given, (x,)).square().sum()
        found.append(torch.autograd.grad(loss, list(given.values())))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("compute", [lambda y: y.exp().mean(), lambda y: y, lambda y: y[1:], lambda y: y.flatten(1)])
@pytest.mark.parametrize("place", ["first", "norm", "drop"])
def test_what_hooks_compute_is_part_of_the_graph(x, place, compute):  # M15
    model, kept = Stem(), []
    model.get_submodule(place).register_forward_hook(lambda module, given, value: kept.append(compute(value)))
    mm, found = recomputing(model, x), []
    for one in (model, mm):
        kept.clear()
        torch.manual_seed(1)
        loss = one(x).square().sum() + kept[-1].sin().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(found[1], found[0])


def test_a_segment_that_does_not_repeat_itself_is_told(x):
    model = Stem()
    mm = recomputing(model, x)
    loss = mm(x).sum()
    model.first.weight.data.mul_(1.1)
    with pytest.warns(mfx.DriftWarning, match="weights changed through .data"):
        loss.backward()


def test_hooks_that_look_run_once(x):  # M5
    model = Stem()
    seen = []
    model.first.register_forward_hook(lambda module, given, value: seen.append(value.shape))
    mm = recomputing(model, x)
    seen.clear()
    mm(x).sum().backward()
    assert len(seen) == 1


def test_autocast_is_the_same_in_both_runs(x):  # M6
    model, x = Stem(p=0.0).float(), x.float()
    grads = []
    for one in (model, recomputing(model, x)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        y.float().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_a_segment_that_ends_in_a_product_does_not_run_it_again():
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    x = torch.randn(512, 4, dtype=torch.float64)
    mm = recomputing(model, x)
    counts = []
    for one in (model, mm):
        with FlopCounterMode(display=False) as counter:
            one(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 512 * 4 * 64


def test_without_gradient_nothing_is_kept_and_nothing_is_wrapped(x):  # M9
    mm = recomputing(Stem(), x).eval()
    with torch.no_grad():
        assert mm(x).grad_fn is None
