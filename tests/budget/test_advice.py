"""Advice: chains that keep their activations without a higher peak, against the allocator where they do."""

from __future__ import annotations

import pytest
import torch
from nets import Block, Net
from peaks import allocated_peak
from torch import nn

import mfx


class Late(nn.Module):
    """A wide part without any block, whose backward needs most, and a chain of narrow blocks after it."""

    def __init__(self, depth=6):
        super().__init__()
        self.wide = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.Tanh())))
        self.narrow = nn.Linear(512, 8)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(self.narrow(self.wide(x)))


class Early(nn.Module):
    """A chain of wide blocks, and little else: what it keeps is there when most is alive."""

    def __init__(self, depth=6):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(128) for _ in range(depth)))
        self.head = nn.Linear(128, 8)

    def forward(self, x):
        return self.head(self.blocks(x))


def peak(model, x):
    """The allocator's peak of a step, in which gradients exist already."""

    def step():
        output = model(x)
        (output * 1).sum().backward()

    step()
    return allocated_peak(step)


@pytest.mark.parametrize(("model", "width", "advice"), [(Late(), 512, "keep"), (Early(), 128, "reverse")])
def test_a_chain_that_is_small_when_most_is_alive_is_better_kept(model, width, advice):
    x = torch.randn(512, width)
    report = mfx.report(model, x)
    assert [chain.advice for chain in report.chains] == [advice]
    assert ("nothing at all does better" in str(report)) == (advice == "keep")
    reversible, stored = (peak(mfx.momentumize(model, reversible=kind), x) for kind in (True, False))
    assert (stored <= reversible * 1.001) == (advice == "keep")
    assert report.step.activations == pytest.approx(reversible, rel=0.05)


class Two(nn.Module):
    """A wide part, whose backward needs the more, the wider it is; then two chains."""

    def __init__(self, width):
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, width), nn.Linear(width, 64)
        self.first = nn.Sequential(*(Block(64, 0.0) for _ in range(4)))
        self.between = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64))
        self.second = nn.Sequential(*(Block(64, 0.0) for _ in range(4)))

    def forward(self, x):
        x = self.narrow(self.wide(x).tanh().tanh())
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(("width", "free"), [(600, [False, False]), (1100, [False, True]), (3000, [True, True])])
def test_the_last_chains_are_kept_first_and_only_as_many_as_have_room_at_once(width, free):
    report = mfx.report(Two(width), torch.empty(256, 64, device="meta"))
    assert [chain.free for chain in report.chains] == free


def test_few_blocks_that_would_be_inverted_are_better_checkpointed():
    x = torch.randn(64, 4, dtype=torch.float64)
    long, short = mfx.report(Net(12, width=32), x), mfx.report(Net(2, width=32), x)
    assert [chain.advice for chain in long.chains] == ["reverse"]
    (chain,) = short.chains
    assert chain.checkpoint_bytes == 2 * 64 * 32 * 8
    assert chain.advice == "checkpoint"
    assert "a checkpoint around each block does better: it keeps 32.0 KiB" in str(short)
    assert "does better" not in str(long)
    # At gamma = 0 a chain is that checkpoint.
    assert [row.advice for row in mfx.report(Net(2, width=32), x, gamma=0.0).chains] == ["reverse"]


def test_half_precision_moves_the_place_where_reversing_pays():
    x = torch.empty(64, 128, dtype=torch.bfloat16, device="meta")
    found = {depth: mfx.report(Early(depth).bfloat16(), x).chains[0] for depth in (2, 4, 12)}
    for depth, chain in found.items():
        assert chain.checkpoint_bytes == depth * 64 * 128 * 2
    # The first keeps every x as it is, the second as many bytes of x and v in float32.
    assert [chain.state_bytes // (64 * 128) for chain in found.values()] == [4, 8, 8]
    assert [chain.advice for chain in found.values()] == ["reverse", "checkpoint", "reverse"]


def test_without_inputs_there_is_no_advice():
    assert [chain.advice for chain in mfx.report(Net(12)).chains] == [""]
