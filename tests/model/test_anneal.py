"""set_gamma and GammaSchedule: shapes, resuming, what a backward sees, what it costs."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from helpers import assert_same, relative_error, run
from nets import Net, rows
from torch import nn

import mfx
from mfx.model.conversion import momentum_of
from mfx.rewrite import Rewritten


def rewritten(mm: nn.Module) -> Rewritten:
    return momentum_of(mm).latest_entry().passed.rewritten


def test_the_shapes():
    mm = mfx.momentumize(Net(3), gamma=0.0)
    linear = mfx.GammaSchedule(mm, 0.1, 0.9, steps=4)
    assert linear.gamma == 0.1
    assert [linear.step() for _ in range(5)] == pytest.approx([0.3, 0.5, 0.7, 0.9, 0.9])
    cosine = mfx.GammaSchedule(mm, 0.0, 0.8, steps=4, shape="cosine")
    assert [cosine.step() for _ in range(4)] == pytest.approx([0.4 * (1 - 0.5**0.5), 0.4, 0.4 * (1 + 0.5**0.5), 0.8])
    down = mfx.GammaSchedule(mm, 0.9, 0.0, steps=2)
    assert [down.step(), down.step()] == pytest.approx([0.45, 0.0])


def test_it_starts_as_the_model_itself_and_ends_as_a_momentum_network():  # M1
    model = Net(5, p=0.0)
    mm = mfx.momentumize(model, gamma=0.5)
    schedule = mfx.GammaSchedule(mm, 0.0, 0.9, steps=10)
    x = rows()
    assert_same(run(mm, x), run(model, x))
    for _ in range(10):
        schedule.step()
    assert_same(run(mm, x), run(mfx.momentumize(model, gamma=0.9), x))


def test_every_gamma_on_the_way_has_the_gradients_of_its_own_recurrence():  # M2
    model = Net(30, p=0.0)
    mm = mfx.momentumize(model, gamma=0.0)
    schedule = mfx.GammaSchedule(mm, 0.0, 0.95, steps=6, shape="cosine")
    x = rows()
    for _ in range(6):
        gamma = schedule.step()
        assert_same(run(mm, x), run(mfx.momentumize(model, gamma=gamma, reversible=False), x))


def test_patterns_are_annealed_each_for_itself():
    model = Net(4, p=0.0)
    mm = mfx.momentumize(model, gamma={"blocks.[01]": 0.0, "*": 0.5})
    schedule = mfx.GammaSchedule(mm, {"blocks.[01]": 0.0, "*": 0.5}, {"blocks.[01]": 0.8, "*": 0.5}, steps=2)
    assert schedule.step() == pytest.approx({"blocks.[01]": 0.4, "*": 0.5})
    assert [step.rule.gamma for step in rewritten(mm).chains[0].steps] == pytest.approx([0.4, 0.4, 0.5, 0.5])


def test_the_plan_follows_gamma():
    model = Net(100, p=0.0).float()
    mm = mfx.momentumize(model, gamma=0.0)
    schedule = mfx.GammaSchedule(mm, 0.0, 0.9, steps=3)
    counts = []
    for _ in range(4):
        chain = rewritten(mm).chains[0]
        counts.append(chain.schedule(torch.float32).state_count(100))
        assert "gamma" in rewritten(mm).code
        assert f"gamma {schedule.gamma:g};" in rewritten(mm).code
        schedule.step()
    assert counts[0] == 100
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 2


def test_a_backward_uses_the_gamma_of_its_forward():  # M8
    model = Net(20, p=0.0)
    mm = mfx.momentumize(model, gamma=0.9)
    x = rows()
    loss = mm(x).square().sum()
    mfx.set_gamma(mm, 0.3)
    found = torch.autograd.grad(loss, [x, *model.parameters()])
    expected_loss = mfx.momentumize(model, gamma=0.9, reversible=False)(x).square().sum()
    assert relative_error(found, torch.autograd.grad(expected_loss, [x, *model.parameters()])) < 1e-10


def test_resuming():
    model = Net(3)
    schedule = mfx.GammaSchedule(mfx.momentumize(model, gamma=0.0), 0.0, 0.9, steps=10, shape="cosine")
    for _ in range(4):
        schedule.step()
    state = copy.deepcopy(schedule.state_dict())
    mm = mfx.momentumize(model, gamma=0.0)
    resumed = mfx.GammaSchedule(mm, 0.0, 0.1, steps=1)
    resumed.load_state_dict(state)
    assert resumed.gamma == schedule.gamma
    assert rewritten(mm).chains[0].steps[0].rule.gamma == schedule.gamma
    assert [resumed.step() for _ in range(8)] == [schedule.step() for _ in range(8)]
    assert torch.load(_saved(state), weights_only=True) == state


def _saved(value: object) -> object:
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_a_change_of_gamma_keeps_the_branches_and_is_cheap():
    mm = mfx.momentumize(Net(300, p=0.0), gamma=0.0)
    before = rewritten(mm)
    start = time.perf_counter()
    for count in range(5):
        mfx.set_gamma(mm, 0.1 * count)
    took = (time.perf_counter() - start) / 5
    after = rewritten(mm)
    pairs = zip(before.chains[0].steps, after.chains[0].steps, strict=True)
    assert all(one.branch is other.branch for one, other in pairs)
    assert before.chains[0].steps[0].rule.gamma == 0.0, "a value in use is not changed"
    assert took < 0.5


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "at least 1"),
        ({"steps": 3, "shape": "square"}, "'linear', 'cosine'"),
        ({"steps": 3, "end": 1.0}, "gamma >= 1"),
        ({"steps": 3, "start": -1.1}, "below -1"),
        ({"steps": 3, "end": {"*": 0.5}}, "same patterns"),
    ],
)
def test_what_it_refuses(given, text):
    with pytest.raises(mfx.OptionError, match=text):
        mfx.GammaSchedule(mfx.momentumize(Net(2), gamma=0.0), **given)


def test_it_wants_a_momentumized_model_and_a_state_of_its_own():
    with pytest.raises(mfx.InputTypeError, match="momentumize"):
        mfx.GammaSchedule(Net(2), steps=1)
    with pytest.raises(mfx.OptionError, match="missing"):
        mfx.GammaSchedule(mfx.momentumize(Net(2), gamma=0.0), steps=1).load_state_dict({"count": 1})
