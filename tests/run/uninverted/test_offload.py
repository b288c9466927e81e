"""Offload: inputs of segments wait on the host, are what they were when they are back, and come back ahead of time.

On the CPU moving a value is a plain copy, so that all but the streams of an accelerator runs here.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from helpers import assert_same, run
from torch import nn

import mfx
from mfx.graph.notes import STATE
from mfx.rewrite import ByRoot, rewrite
from mfx.run.uninverted import offload

pytestmark = pytest.mark.filterwarnings("ignore::mfx.NothingRewrittenWarning")


class Tower(nn.Module):
    """Stages that change the width, with all that a second run could get wrong."""

    def __init__(self, stages=4):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6 + k, 7 + k),
                nn.BatchNorm1d(7 + k),
                nn.GELU(),
                nn.Linear(7 + k, 7 + k),
                nn.Tanh(),
                nn.Dropout(0.3),
            )
            for k in range(stages)
        )

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


@pytest.fixture
def x():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def offloading(model, x, every=True):
    """``model`` with all segments recomputed, from inputs on the host."""
    mm = mfx.momentumize(model, 0.0, example_inputs=x, activation_budget=0.0)
    momentum = mm.__dict__[STATE]
    entry = momentum.latest_entry()
    assert len(entry.passed.plan.segments) > 2, "nothing would be tested"
    planned = replace(entry.passed.plan, offloaded=len(entry.passed.plan.segments) if every else 2)
    passed = replace(entry.passed, plan=planned, rewritten=rewrite(entry.passed.found, planned, ByRoot()))
    momentum.entries[-1] = replace(entry, passed=passed)
    return mm


@pytest.fixture
def moved(monkeypatch):
    """Each value on the host, in the order of the forward."""
    found = []
    made = offload.Waiting.__init__

    def noted(self, tensor):
        made(self, tensor)
        found.append(self)

    monkeypatch.setattr(offload.Waiting, "__init__", noted)
    return found


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_gradients_and_buffers_are_the_models(x, moved, every, autocast):  # M1, M5, M6
    model = Tower()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mm = offloading(model, x, every)
        moved.clear()
        assert_same(run(mm, x), run(model, x), 0.0)
    assert moved


def test_inputs_of_the_model_stay_where_they_are(x, moved):
    mm = offloading(Tower(), x)
    moved.clear()
    mm(x)
    segments = mm.__dict__[STATE].latest_entry().passed.plan.segments
    assert len(moved) == len(segments) - 1


def test_nothing_but_the_host_holds_what_was_moved(x):
    mm, seen = offloading(Tower(), x), []
    boundary = mm.__dict__[STATE].latest_entry().passed.plan.segments[1].skip
    owner = mm.get_submodule(str(boundary.target))

    def look(_, __, output):
        seen.append(weakref.ref(output.untyped_storage()))

    assert boundary.op == "call_module", "what a segment hands on is the output of a module here"
    handle = owner.register_forward_hook(look)
    y = mm(x)
    handle.remove()
    assert seen
    assert seen[0]() is None
    y.sum().backward()


def test_a_backward_can_be_repeated_and_two_forwards_may_come_first(x):  # M7
    model = Tower().eval()
    mm, found = offloading(model, x).eval(), []
    for one in (model, mm):
        one.zero_grad()
        first, second = one(x).square().sum(), one(2 * x).sum()
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_what_is_asked_for_next_comes_back_ahead_of_time(x, moved):
    mm = offloading(Tower(), x)
    moved.clear()
    y = mm(x)
    *_, before, last = list(moved)
    assert last.before() is before
    assert before.coming is None
    last.returned()
    assert before.coming is not None
    assert last.coming is None
    assert torch.equal(before.returned(), before.host)
    y.sum().backward()


def test_a_run_does_not_ask_for_values_of_the_run_before(x, moved):
    mm = offloading(Tower(), x)
    moved.clear()
    kept = mm(x)
    count = len(moved)
    mm(x).sum().backward()
    assert moved[count].before is None
    assert all(waiting.coming is None for waiting in moved[:count])
    kept.sum().backward()
