"""Far skips: what the plan asks for is what it would have been, had all of them been collected."""

from __future__ import annotations

import pytest
from described import build, inputs
from graphs import Part, net, prepared
from hypothesis import given, reject
from strategies import models
from torch import nn

import mfx
from mfx import Reason
from mfx.find import far


def block(**parts):
    return Part(lambda self, x: x + self.f(x), **parts)


def one_far_skip(self, x):
    x = first = self.f(x)
    for inner in self.blocks:
        x = x + (inner(x) + first)
    return x


def skips_in_a_row(self, x):
    """Two blocks that are far themselves, the second from the first, around chains of one block."""
    y = x + self.g(self.f(x) + self.h(self.f(x)))
    z = y + self.h(self.g(y))
    return z + self.f(self.h(z))


def long_skip(self, x):
    """Around a chain of two, and gone on with after itself."""
    y = x + self.f(x)
    y = y + self.g(y)
    return self.h(x + y)


def longer_outside(self, x):
    for _ in range(3):
        y = self.f(x)
        y = y + self.g(y)
        x = x + self.h(y)
    return x


def with_tail(self, x):
    y = x + self.f(x)
    return (x + self.g(y + self.h(y))).relu()


def beside_a_chain(self, x):
    """A block whose branch reads the end of a longer chain that is not inside of it."""
    s, y = self.f(x), self.g(x)
    for _ in range(3):
        y = y + self.h(y)
    s = s + self.f(s) * y
    return s, s.relu()


@pytest.fixture
def all_far(monkeypatch):
    def switch(on: bool) -> None:
        monkeypatch.setattr(far, "NEAR", 0 if on else 10**9)
        monkeypatch.setattr(far, "A_NODE", 0)

    return switch


def parts_of(forward):
    return (
        {"blocks": nn.ModuleList(Part(lambda self, x: self.f(x)) for _ in range(5))} if forward is one_far_skip else {}
    )


def planned(model, **options):
    plan = prepared(model, **options).plan
    return plan.names, {(row.name, row.reason) for row in plan.rejections}


@pytest.mark.parametrize("options", [{}, {"exclude": "#0"}, {"include": "#[123]"}, {"gamma": {"#[02]": 0.5}}])
@pytest.mark.parametrize(
    "forward", [one_far_skip, skips_in_a_row, long_skip, longer_outside, with_tail, beside_a_chain]
)
def test_the_plan_is_that_of_all_blocks_collected(forward, options, all_far):
    model = net(forward, **parts_of(forward))
    found = []
    for on in (False, True):
        all_far(on)
        try:
            found.append(planned(model, **options))
        except mfx.OptionError as error:
            found.append(str(error))
    assert found[0] == found[1]


@given(models())
def test_random_models_have_the_plan_of_all_blocks_collected(model):
    network, example = build(model), inputs(model) if model.example else None
    found = []
    for near in (10**9, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(far, "NEAR", near)
            patch.setattr(far, "A_NODE", 0)
            try:
                plans = mfx.report(network, example)
            except mfx.OptionError:
                reject()
            found.append([(row.name, row.status, row.chain) for row in plans.blocks])
    assert found[0] == found[1]


def test_of_many_far_skips_none_is_collected(all_far, monkeypatch):
    monkeypatch.setattr(far, "NEAR", 10)
    monkeypatch.setattr(far, "A_NODE", 0)
    collected = []
    original = far.Far.collected
    monkeypatch.setattr(far.Far, "collected", lambda self, flow: collected.append(self.add) or original(self, flow))
    blocks = nn.ModuleList(Part(lambda self, x: self.f(x)) for _ in range(20))
    passed = prepared(net(one_far_skip, blocks=blocks))
    nested = [row for row in passed.plan.rejections if row.reason is Reason.NESTED]
    assert [len(chain) for chain in passed.plan.names] == [20]
    assert len(passed.found.far) > 10
    assert {row.add for row in passed.found.far}.isdisjoint(collected)
    assert len(nested) >= len(passed.found.far)


def test_where_the_longer_chain_is_excluded_a_far_skip_becomes_a_block(all_far):
    all_far(True)
    names, _ = planned(net(long_skip), exclude=["#0", "#1"])
    assert names == (("#2",),)
