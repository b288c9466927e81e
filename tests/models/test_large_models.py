"""The pass is linear in the number of nodes: counted in operations on nodes, and in seconds at 2,000 blocks."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from graphs import Part, net, prepared
from helpers import chain_names
from torch import nn

import mfx
from mfx.find import far, find
from mfx.options import make_options
from mfx.plan import plan


def plain(self, x):
    return x + self.f(torch.relu(self.g(x)))


def wrapped(self, x):
    return torch.relu(x + self.f(self.g(x)))


def with_shapes(self, x):
    return x + self.f(x).view(x.size(0), -1).reshape(x.shape)


def tapped(self, x):
    states = []
    for block in self.blocks:
        x = block(x)
        states.append(self.f(x))
    return states


def sided(self, x):
    side = self.f(x)
    for block in self.blocks:
        x = x + (self.g(block(x)) * side + side)
    return x


def with_far_skip(self, x):
    x = far = self.f(x)
    for block in self.blocks:
        x = x + (self.g(block(x)) + far)
    return x


def in_a_row(self, x):
    for block in self.blocks:
        x = block(x)
    return x


def model_of(count, block, forward=in_a_row):
    return net(forward, blocks=nn.ModuleList(Part(block) for _ in range(count)))


def calls(function) -> int:
    """How many Python and built-in functions a call runs: its work, whatever else the machine does."""
    counted = 0

    def count(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize(
    ("block", "forward"), [(plain, in_a_row), (wrapped, in_a_row), (with_shapes, in_a_row), (plain, tapped)]
)
def test_four_times_the_blocks_are_about_four_times_the_work(block, forward):
    def work(count):
        entry = prepared(model_of(count, block, forward))
        return calls(lambda: plan(find(entry.found.flow.graph, entry.found.flow.root), make_options()))

    assert work(200) < 4.5 * work(50)


@pytest.mark.parametrize("forward", [in_a_row, tapped, with_far_skip])
def test_a_report_of_four_times_the_blocks_is_about_four_times_the_work(forward, monkeypatch):
    monkeypatch.setattr(far, "NEAR", 16)
    monkeypatch.setattr(far, "A_NODE", 4)
    models = {count: model_of(count, plain, forward) for count in (10, 40, 160)}
    work = {count: calls(lambda model=model: mfx.report(model)) for count, model in models.items()}
    assert work[160] - work[40] < 4.5 * (work[40] - work[10])


@pytest.mark.slow
def test_two_thousand_blocks_take_less_than_a_minute():
    model = model_of(2000, wrapped)
    start = time.monotonic()
    mm = mfx.momentumize(model)
    assert time.monotonic() - start < 60
    assert [len(chain) for chain in chain_names(mm)] == [2000]
