"""M2: what hangs on an element being exactly 0 hangs on it in the recomputation too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import kept_bytes, relative_error
from torch import Tensor, nn

import mfx
from mfx.rule.arithmetic.zeros import counted_zeros, with_zeros

F32 = torch.float32


class PreAct(nn.Module):
    """x + drop(conv(relu(bn(x)))), where whole channels are dropped."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout2d(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(F.relu(self.bn(x))))


class Dropped(nn.Module):
    """A stem whose channels are dropped, blocks, a head."""

    def __init__(self, depth: int, p: float, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Dropout2d(0.5))
        self.blocks = nn.Sequential(*(PreAct(width, p) for _ in range(depth)))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def gradients(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    return list(torch.autograd.grad(run(x).square().sum(), list(model.parameters())))


def by_hand(model: Dropped, gamma: float, x: Tensor) -> Tensor:
    x = model.stem(x)
    v = torch.zeros_like(x)
    for block in model.blocks:
        v = gamma * v + (1 - gamma) * (block(x) - x)
        x = x + v
    return model.head(x.mean((2, 3)))


@pytest.mark.parametrize("gamma", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("state_dtype", ["auto", F32, torch.float64])
def test_a_dropped_channel_that_is_normalized_and_rectified(p, gamma, state_dtype):
    """With p some channels stay 0 over several blocks. One picture, so that a dropped channel is 0 in the batch."""
    torch.manual_seed(0)
    model, x = Dropped(4, p), torch.randn(1, 3, 8, 8)
    mm = mfx.momentumize(model, gamma, state_dtype=state_dtype)
    ours = gradients(mm, model, x)
    theirs = gradients(lambda x: by_hand(model, gamma, x), model, x)
    for name, one, other in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6 * max(g.norm() for g in theirs), name


def test_zeros_cost_a_byte_an_element_and_nothing_where_there_are_none():
    torch.manual_seed(0)
    x, kept = torch.randn(1, 3, 8, 8), []
    for rate in (0.0, 0.5):
        for depth in (4, 8):
            model = Dropped(depth, 0.0)
            model.stem[1].p = rate
            mm = mfx.momentumize(model, 0.9, state_dtype=F32)
            kept.append(kept_bytes(mm, x) - (x.new_empty(0).element_size() * 8 if rate else 0))
    assert kept[0] == kept[1]
    assert kept[2] == kept[3], "it does not grow with depth"
    assert kept[2] - kept[0] == 8 * 8 * 8


def test_counting():
    states = [torch.tensor(values) for values in ([0.0, 0.0, 1.0, -0.0], [0.0, 2.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0])]
    for known in (True, False):
        counts = None
        for steps, state in enumerate(states):
            counts = counted_zeros(counts, state, steps, known)
        assert counts.tolist() == [2, 1, 0, 3]
        for steps, state in enumerate(states):
            noisy = state + 1e-7
            expected = torch.where(counts > steps, 0.0, noisy)
            assert torch.equal(with_zeros(noisy, counts, steps), expected)
    assert counted_zeros(None, torch.ones(3), 0, True) is None
    assert counted_zeros(None, torch.ones(3), 0, False).tolist() == [0, 0, 0]
    assert with_zeros(states[0], None, 0) is states[0]


def test_nan_and_infinity_are_no_zeros():
    x = torch.tensor([float("nan"), float("inf"), 0.0])
    counts = counted_zeros(None, x, 0, True)
    assert counts.tolist() == [0, 0, 1]
    assert relative_error([with_zeros(x, counts, 0)], [x]) == 0


def test_a_chain_in_float64_of_float64_branches_keeps_its_zeros_too():
    torch.manual_seed(0)
    model, x = Dropped(3, 0.5).double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    for gamma in (0.9, 0.5):
        ours = gradients(mfx.momentumize(model, gamma), model, x)
        assert relative_error(ours, gradients(lambda x, g=gamma: by_hand(model, g, x), model, x)) < 1e-10
