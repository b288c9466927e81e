"""Graphs that are run on fake tensors: what a node is given there is what the graph's own code gives it."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same, chain_names, run
from nets import Net, rows
from recurrence import NetByHand
from torch import Tensor, nn

import mfx


@torch.fx.wrap
def clipped(window: list[int], sizes: dict[str, list[int]], width: int) -> list[int]:
    """Writes to the lists that it is given, which are the caller's own copies."""
    for place, size in enumerate(window):
        if size > width:
            window[place] = width
    sizes["shift"][0] = 0
    return [*window, *sizes["shift"]]


class Windowed(nn.Module):
    """x + down(dropout(x rolled by a window)), where a wrapped helper clips the window (torchvision's Video Swin)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down, self.dropout = nn.Linear(width, width), nn.Dropout(0.2)
        self.window, self.shift = [8, 2], [3]

    def forward(self, x: Tensor) -> Tensor:
        most, least, shift = clipped(self.window.copy(), {"shift": self.shift.copy()}, x.size(1))
        return x + self.down(self.dropout(x.roll(most + shift, 1) + x.roll(least, 1)))


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_a_wrapped_helper_may_write_to_the_lists_that_it_is_given(capture: str) -> None:
    torch.manual_seed(0)
    model, x = Net(3, block=Windowed), rows()
    mm = mfx.momentumize(model, 0.9, example_inputs=x, capture=capture)
    assert [len(chain) for chain in chain_names(mm)] == [3]
    assert_same(run(mm, x), run(NetByHand(model, 0.9), x))
    mfx.set_gamma(mm, 0.0)
    assert_same(run(mm, x), run(model, x))
    assert model.blocks[0].window == [8, 2]


@torch.fx.wrap
def widened(window: list[int], width: int) -> int:
    """Writes to a list that its caller goes on with."""
    window[0] += 1
    return window[0] % width


class Owned(Windowed):
    """The helper changes the block's own list, so that each call rolls further."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(x.roll(widened(self.window, x.size(1)), 1)))


class ReadLater(Windowed):
    """The helper changes a list that is read afterwards, outside of what a tracer sees."""

    def forward(self, x: Tensor) -> Tensor:
        window = self.window.copy()
        return x + self.down(self.dropout(x.roll(widened(window, x.size(1)), 1) + x.roll(window[0], 1)))


@pytest.mark.parametrize("block", [Owned, ReadLater])
@pytest.mark.parametrize("with_example", [True, False])
def test_a_list_that_the_model_reads_after_a_helper_wrote_to_it_is_never_taken_as_it_was(
    block: type[nn.Module], with_example: bool
) -> None:
    torch.manual_seed(0)
    model, x = Net(3, block=block), rows()
    twin = copy.deepcopy(model)
    mm = mfx.momentumize(model, 0.9, example_inputs=x if with_example else None)
    for _ in range(3):
        assert_same(run(mm, x), run(NetByHand(twin, 0.9), x))
