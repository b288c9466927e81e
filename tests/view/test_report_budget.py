"""Reports under a budget: what is kept, reversed and recomputed, and the peak of a step."""

from __future__ import annotations

import json

import pytest
import torch
from nets import Net
from torch import nn

import mfx
from mfx.cli import main

X = torch.empty(256, 4, dtype=torch.float64, device="meta")


def test_blocks_and_segments_say_what_a_budget_does_with_them():
    model = Net(12, width=32)
    least = mfx.report(model, X, activation_budget=0.0)
    assert {row.treatment for row in least.blocks} == {"reverse"}
    middle = mfx.report(model, X, activation_budget=(least.forecast.least + least.forecast.plain) // 2)
    assert {row.treatment for row in middle.blocks} == {"reverse", "keep"}
    assert {row.treatment for row in mfx.report(model, X, activation_budget=1.0).blocks} == {"keep"}
    assert {row.treatment for row in mfx.report(model, X, gamma=0.0, activation_budget=0.0).blocks} <= {
        "recompute",
        "keep",
    }
    assert {row.treatment for row in mfx.report(model, X).blocks} == {""}


def test_a_model_without_blocks_has_segments_in_its_report():
    model = nn.Sequential(
        *(layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 2)
    ).double()
    report = mfx.report(model, X, activation_budget=0.0)
    assert report.segments
    assert report.forecast.after_forward < report.forecast.plain_after_forward
    text = str(report)
    assert "recomputed: segment 0" in text
    assert "of plain backprop" in text
    assert "most is alive at: " in text
    assert json.loads(json.dumps(report.to_dict()))["forecast"]["peak"] == report.forecast.peak


@pytest.mark.parametrize(
    ("budget", "status"), [("0.5", 0), ("8GB", 0), ("100000000", 0), ("10", 2), ("1.5", 2), ("x", 2)]
)
def test_the_command_line_takes_bytes_texts_and_fractions(budget, status, capsys):
    arguments = ["report", "torchvision:resnet18", "--input", "2,3,32,32", "--activation-budget", budget]
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert ("activations of a training step at most" in shown.out) == (status == 0)
    assert ("activation_budget" in shown.err) == (status == 2)
