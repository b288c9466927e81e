"""Choose: what a budget keeps, what it recomputes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, kept_bytes, run
from nets import ConvNet, Net
from torch import nn

import mfx
from mfx.graph.notes import STATE


def image():
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


def planned(model, x, budget, gamma=0.9):
    mm = mfx.momentumize(model, gamma, example_inputs=x, activation_budget=budget)
    return mm, mm.__dict__[STATE].latest_entry().passed.plan


class Plain(nn.Module):
    """No residual add anywhere: convolutions with normalization, dropout and an in-place activation."""

    def __init__(self, depth=6):
        super().__init__()
        layers = [
            [nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True)] for n in range(depth)
        ]
        self.body = nn.Sequential(*(layer for three in layers for layer in three), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)
        self.double()

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::mfx.NothingRewrittenWarning")
@pytest.mark.parametrize("model", [Plain(), ConvNet(4), Net(4)], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_a_budget_changes_memory_and_nothing_else(model, budget):  # M1, M5, M6
    x = torch.randn(3, 4, dtype=torch.float64) if isinstance(model, Net) else image()
    for gamma in (0.0, 0.9):
        stored = mfx.momentumize(model, gamma, example_inputs=x, reversible=False)
        mm, _ = planned(model, x, budget, gamma)
        for training in (True, False):
            reference = model if gamma == 0 else stored
            for one in (model, stored, mm):
                one.train(training)
            assert_same(run(mm, x), run(reference, x))


@pytest.mark.filterwarnings("ignore::mfx.NothingRewrittenWarning")
def test_the_least_keeps_a_small_part_of_a_model_without_any_block():
    model, x = Plain(12), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mm, plan = planned(model, x, 0.0, gamma=0.0)
    assert not plan.chains
    assert len(plan.segments) > 1
    assert kept_bytes(mm, x) < 0.4 * kept_bytes(model, x)


class Gated(nn.Module):
    """Computes a gate without gradient between two stacks."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(3), Net(3)
        self.first.head = nn.Linear(6, 4).double()

    def forward(self, x):
        x = self.first(x)
        with torch.no_grad():
            gate = torch.sigmoid(x)
        return self.second(x * gate)


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.6, 1.0])
def test_what_the_model_computes_without_gradient_stays_so_within_a_budget(budget):  # M12
    model, x = Gated(), torch.randn(3, 4, dtype=torch.float64)
    for gamma in (0.0, 0.9):
        mm, plan = planned(model, x, budget, gamma)
        reference = mfx.momentumize(model, gamma, reversible=False)
        assert_same(run(mm, x), run(reference, x))
        if (gamma, budget) == (0.0, 1.0):
            assert plan.forecast.peak == plan.forecast.plain


def test_all_is_kept_as_in_the_plain_model_where_the_whole_is_allowed():
    model, x = ConvNet(4), image()
    mm, plan = planned(model, x, 1.0, gamma=0.0)
    assert plan.segments == ()
    run(mm, x)  # what is proven at a first call is no part of a step
    assert kept_bytes(mm, x) == kept_bytes(model, x)
    mm, plan = planned(model, x, 1.0, gamma=0.9)
    assert [chain.way.text for chain in plan.chains] == ["the activation budget allows it"]
    stored = mfx.momentumize(model, 0.9, reversible=False)
    run(mm, x), run(stored, x)
    assert kept_bytes(mm, x) == kept_bytes(stored, x)


def test_more_budget_never_keeps_less_and_stays_within():
    model, x = Net(12, width=32), torch.randn(256, 4, dtype=torch.float64)
    _, least = planned(model, x, 0.0)
    bottom, top = least.forecast.least, least.forecast.plain
    kept = []
    for share in (0.0, 0.25, 0.5, 0.75):
        budget = int(bottom + share * (top - bottom))
        _, plan = planned(model, x, budget)
        assert plan.forecast.peak <= budget
        kept.append(sum(len(chain.kept) for chain in plan.chains))
    assert kept == sorted(kept)
    assert 0 < kept[2] < 12


def test_the_last_block_keeps_its_activations_where_the_peak_stays_what_it_is():
    """At the peak, where a wide stem runs again, they are gone."""
    model, x = Net(6, width=32), torch.randn(256, 4, dtype=torch.float64)
    _, narrow = planned(model, x, 0.0)
    model.stem = nn.Sequential(nn.Linear(4, 2048), nn.Tanh(), nn.Linear(2048, 32)).double()
    mm, wide = planned(model, x, 0.0)
    assert [sorted(plan.chains[0].kept) for plan in (narrow, wide)] == [[], [5]]
    assert all(plan.forecast.peak <= plan.forecast.least for plan in (narrow, wide))
    assert_same(run(mm, x), run(mfx.momentumize(model, 0.9, reversible=False), x))


def test_fewer_bytes_than_possible_are_refused_with_the_least():
    model, x = Net(4), torch.randn(64, 4, dtype=torch.float64)
    _, plan = planned(model, x, 0.0)
    with pytest.raises(mfx.OptionError, match=rf"at least .*\({plan.forecast.least} bytes\)"):
        mfx.momentumize(model, example_inputs=x, activation_budget=10)


def test_a_budget_needs_the_inputs_that_it_is_for():
    with pytest.raises(mfx.OptionError, match=r"activation_budget=0\.5 needs example_inputs"):
        mfx.momentumize(Net(), activation_budget=0.5)
    with pytest.raises(mfx.OptionError, match=r"activation_budget=0\.5 needs example_inputs"):
        mfx.report(Net(), activation_budget=0.5)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (-1, "negative"),
        (1.5, "outside of"),
        (-0.5, "outside of"),
        (float("nan"), "outside of"),
        ("8 apples", "cannot be read"),
        ("", "cannot be read"),
        ("-3GB", "cannot be read"),
        (True, "is a bool"),
        ([1], "is a list"),
    ],
)
def test_budgets_that_mean_nothing_are_refused_with_what_would(budget, message):
    with pytest.raises((mfx.OptionError, mfx.InputTypeError), match=rf"activation_budget=.*{message}.*'8GB'"):
        mfx.momentumize(Net(), example_inputs=torch.ones(2, 4).double(), activation_budget=budget)


def test_a_text_and_its_bytes_give_one_plan():
    model, x = Net(6, width=32), torch.randn(256, 4, dtype=torch.float64)
    _, text = planned(model, x, "1.5 MiB")
    _, number = planned(model, x, 1536 * 1024)
    assert text.forecast == number.forecast


def test_gamma_can_be_changed_under_a_budget_which_is_then_planned_for_anew():
    model, x = Net(12, width=32), torch.randn(256, 4, dtype=torch.float64)
    mm, at_0 = planned(model, x, 0.0, gamma=0.0)
    names = [chain.blocks for chain in mfx.chains(mm)]
    for gamma in (0.9, 0.5, 0.0):
        mfx.set_gamma(mm, gamma)
        assert [chain.blocks for chain in mfx.chains(mm)] == names
        assert_same(run(mm, x), run(mfx.momentumize(model, gamma, reversible=False), x))
        plan = mm.__dict__[STATE].latest_entry().passed.plan
        assert [chain.plain for chain in plan.chains] == [gamma == 0]
        assert bool(plan.segments) == bool(at_0.segments)
        assert plan.forecast is not None
