"""Budgets on an accelerator: what segments need waits on the host, as far as that is asked for.

A model on the meta device is one for an accelerator, and needs none.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mfx
from mfx.graph.notes import STATE


def tower(device):
    """Wide and narrow layers in turn, so that what segments start from is most of what is kept."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 1)).to(device)


def planned(device, budget):
    model, x = tower(device), torch.empty(512, 64, device=device)
    mm = mfx.momentumize(model, 0.0, example_inputs=x, activation_budget=budget)
    return mm.__dict__[STATE].latest_entry().passed.plan


def test_the_least_on_an_accelerator_is_less_than_on_the_cpu():
    here, there = planned("cpu", 0.0), planned("meta", 0.0)
    assert here.offloaded == 0
    assert there.offloaded > 0
    assert there.forecast.plain == here.forecast.plain
    assert there.forecast.after_forward < 0.5 * here.forecast.after_forward
    assert there.forecast.peak < here.forecast.peak


def test_no_more_than_needed_waits_on_the_host():
    least, without = planned("meta", 0.0), planned("cpu", 0.0)
    between = (least.forecast.peak + without.forecast.peak) // 2
    some = planned("meta", between)
    assert 0 < some.offloaded < least.offloaded
    assert some.forecast.peak <= between
    assert planned("meta", without.forecast.peak).offloaded == 0


def test_what_is_not_possible_without_is_an_error_on_the_cpu_alone():
    least, without = planned("meta", 0.0), planned("cpu", 0.0)
    between = (least.forecast.peak + without.forecast.peak) // 2
    with pytest.raises(mfx.OptionError, match="less than is possible"):
        planned("cpu", between)
    with pytest.raises(mfx.OptionError, match="less than is possible"):
        planned("meta", least.forecast.peak - 1)


def test_the_report_says_what_waits_on_the_host():
    x = torch.empty(512, 64, device="meta")
    report = mfx.report(tower("meta"), x, gamma=0.0, activation_budget=0.0)
    assert "offload" in {row.treatment for row in report.segments}
    assert "from inputs on the host" in str(report)
    assert "host" not in str(mfx.report(tower("cpu"), x, gamma=0.0, activation_budget=0.0))


def test_inputs_on_the_meta_device_are_for_where_the_model_is():
    model, x = tower("cpu"), torch.empty(512, 64, device="meta")
    plan = (
        mfx.momentumize(model, 0.0, example_inputs=x, activation_budget=0.0).__dict__[STATE].latest_entry().passed.plan
    )
    assert plan.forecast == planned("cpu", 0.0).forecast
