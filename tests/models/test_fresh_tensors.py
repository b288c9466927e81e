"""Branches that write to tensors that they make: the values belong to the block, whatever way they are written."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, chain_names, run
from recurrence import by_hand
from torch import Tensor, nn

import mfx


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.drop = nn.Linear(6, 6), nn.Linear(6, 6), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))


class CopiedToSlices(Block):
    """Keys are put together in a new tensor, by views of it (DeepSeek's attention)."""

    def branch(self, x: Tensor) -> Tensor:
        keys = x.new_empty(x.shape)
        keys[..., :2].copy_(self.f(x)[..., 2:4])
        keys[..., 2:].copy_(self.f(x)[..., :4].cos())
        return self.g(x) * keys


class Assigned(Block):
    def branch(self, x: Tensor) -> Tensor:
        keys = torch.empty_like(x)
        keys[..., :3] = self.f(x)[..., 3:]
        keys[..., 3:] = self.g(x)[..., :3]
        return torch.tanh(keys)


class Scattered(Block):
    """Each half of the rows goes through its own layer (a mixture of experts)."""

    def branch(self, x: Tensor) -> Tensor:
        rows, half = torch.arange(x.shape[0]), x.shape[0] // 2
        total = torch.zeros_like(x)
        total.index_add_(0, rows[:half], self.f(x[:half]))
        total.index_add_(0, rows[half:], self.g(x[half:]))
        return total


class Viewed(Block):
    """Written to through a view of a view, and read as another shape."""

    def branch(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0], 2, 3)
        total[:, 0][:, 1:].copy_(self.f(x)[:, :2])
        total[:, 1].add_(self.g(x)[:, 3:])
        return total.flatten(1)


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("block", [CopiedToSlices, Assigned, Scattered, Viewed])
def test_values_written_to_new_tensors_are_a_part_of_the_branch(block, capture, gamma):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(block() for _ in range(4))).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mm = mfx.momentumize(blocks, gamma, example_inputs=x, capture=capture)
    assert [len(chain) for chain in chain_names(mm)] == [4]
    assert_same(run(mm, x), by_hand(blocks, gamma, x), 1e-10)
