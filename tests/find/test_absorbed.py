"""What a block's module computes before it looks at x belongs to the branch, also where the add runs in the root."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, run
from torch import Tensor, nn

import mfx


class Filtered(nn.Module):
    """down(x * filter(distances)): the filter is known without x (SchNet's continuous convolutions)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, width))
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor, distances: Tensor, ready: Tensor | None = None) -> Tensor:
        weights = self.filter(distances) if ready is None else ready
        return self.down(torch.tanh(x * weights))


class Interactions(nn.Module):
    """The add runs in the root; gamma None is the plain network.  ``shared``: one filter for all, made before."""

    def __init__(self, depth: int, shared: bool = False) -> None:
        super().__init__()
        self.stem, self.head, self.shared = nn.Linear(4, 6), nn.Linear(6, 2), shared
        self.blocks = nn.ModuleList(Filtered() for _ in range(depth))
        self.gamma: Any = None
        self.double()

    def forward(self, x: Tensor, distances: Tensor) -> Tensor:
        x = self.stem(x)
        v = torch.zeros_like(x)
        ready = self.blocks[0].filter(distances) if self.shared else None
        for block in self.blocks:
            if self.gamma is None:
                x = x + block(x, distances, ready)
            else:
                v = self.gamma * v + (1 - self.gamma) * block(x, distances, ready)
                x = x + v
        return self.head(x)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)


def kept(depth: int) -> int:
    mm = mfx.momentumize(Interactions(depth), 0.9, state_dtype=torch.float64)
    return mfx.kept_bytes(mm, inputs(), lambda: mm(*inputs()))[0]


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_filter_of_side_inputs_is_right_whether_a_branch_has_it_to_itself_or_not(capture: str, shared: bool) -> None:
    torch.manual_seed(0)
    model = Interactions(3, shared)
    mm = mfx.momentumize(model, 0.9, example_inputs=inputs(), capture=capture)
    own = {row.name: row.parameters for row in mfx.report(model, inputs(), capture=capture).blocks}
    filters = sum(parameter.numel() for parameter in model.blocks[0].filter.parameters())
    down = sum(parameter.numel() for parameter in model.blocks[0].down.parameters())
    assert set(own.values()) == {down if shared else down + filters}
    plain = run(mm, *inputs())
    model.gamma = 0.9
    assert_same(plain, run(model, *inputs()))


def test_bytes_kept_do_not_grow_with_the_number_of_filters() -> None:
    assert kept(12) == kept(4)
