"""Footprint: all that a training step has alive, against the allocator."""

from __future__ import annotations

import json

import pytest
import torch
from nets import Block, Net
from peaks import allocated_peak
from torch import nn

import mfx
from mfx.cli import main


class Stack(nn.Module):
    """Blocks between two layers; made inside of what is measured, so that all of it counts."""

    def __init__(self, width=128, depth=6):
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, width)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def all_at_once(parameters, lr=1e-6):
    """AdamW as on an accelerator, whose step needs a copy of all parameters for itself."""
    return torch.optim.AdamW(parameters, lr=lr, foreach=True)


def trained(rows, kind, momentum, keep=False):
    """The most bytes alive while a model is made and trained for three steps."""

    def run():
        model, x = Stack(), torch.randn(rows, 128)
        mm = mfx.momentumize(model) if momentum else model
        optimizer = kind(mm.parameters(), lr=1e-6)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=not keep)
            output = mm(x)
            (output * 1).sum().backward()
            optimizer.step()

    return allocated_peak(run)


@pytest.mark.parametrize("rows", [16, 4096], ids=["parameters are most", "activations are most"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, all_at_once])
def test_the_total_is_what_a_training_step_has_alive(rows, kind):
    found = mfx.report(Stack(), torch.empty(rows, 128, device="meta"), optimizer=kind).step
    assert found.total == pytest.approx(trained(rows, kind, momentum=True), rel=0.05)
    assert found.total_plain == pytest.approx(trained(rows, kind, momentum=False), rel=0.05)
    assert found.total_accumulating == pytest.approx(trained(rows, kind, True, keep=True), rel=0.05)
    assert found.total <= found.total_accumulating


def test_the_parts_are_those_of_the_model_and_its_optimizer():
    model = Stack()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    report = mfx.report(model, torch.empty(64, 128, device="meta"), optimizer="adam")
    step = report.step
    assert (step.parameters, step.gradients, step.buffers, step.inputs) == (size, size, 0, 64 * 128 * 4)
    assert step.optimizer_state == pytest.approx(2 * size, abs=4 * len(list(model.parameters())))
    assert step.activations < step.activations_plain
    assert json.loads(json.dumps(report.to_dict()))["step"]["total"] == step.total
    text = str(report)
    for line in ("optimizer's state", "activations, at most", "all, at most", "plain backprop", "most is alive at: "):
        assert line in text


def test_an_optimizer_alone_is_counted_without_inputs():
    report = mfx.report(Net(), optimizer="adam")
    step = report.step
    assert step.activations is None
    assert step.total == step.parameters + step.buffers + step.gradients + step.optimizer_state + step.optimizer_step
    assert "all but activations" in str(report)
    assert mfx.report(Net()).step is None
    assert mfx.report(Net(), torch.empty(2, 4, dtype=torch.float64, device="meta")).step.optimizer_state is None


def test_learned_velocities_have_state_as_well():
    x = torch.empty(8, 4, dtype=torch.float64, device="meta")
    zero, learned = (
        mfx.report(Net(), x, velocity=velocity, optimizer="adam").step
        for velocity in ("zero", lambda chain: nn.Linear(6, 6).double())
    )
    assert learned.parameters - zero.parameters == 42 * 8
    assert learned.optimizer_state - zero.optimizer_state == 2 * 42 * 8 + 2 * 4


def test_a_model_without_blocks_has_a_footprint():
    report = mfx.report(nn.Linear(4, 4), torch.empty(2, 4, device="meta"), optimizer="sgd")
    assert "all, at most" in str(report)
    assert report.step.optimizer_state == 0


class Refused(nn.Module):
    """What ReLU saved is overwritten before backward, which autograd refuses."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.last(self.blocks(x))).add_(1)


def test_a_model_that_has_no_backward_is_reported_without_activations():
    report = mfx.report(Refused(), torch.empty(2, 8, device="meta"), optimizer="sgd")
    assert report.rewritable == ["blocks.0", "blocks.1"]
    assert report.step.activations is None
    assert "modified by an inplace operation" in report.step.unknown
    assert "activations are not known: RuntimeError: one of the variables" in str(report)
    with pytest.raises(mfx.CaptureError, match="cannot be foreseen, since it cannot be run: RuntimeError: one of"):
        mfx.fit(Refused(), torch.empty(2, 8, device="meta"), "1GB")


def test_the_command_line_names_an_optimizer(capsys):
    assert main(["report", "torchvision:resnet18", "--optimizer", "adamw"]) == 0
    assert "optimizer's state" in capsys.readouterr().out
    assert main(["report", "torchvision:resnet18", "--optimizer", "adamx"]) == 2
    assert "optimizer='adamx' is no class of torch.optim" in capsys.readouterr().err
