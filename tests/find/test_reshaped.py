"""Blocks that compute in another shape than their chain: which are linked, which are not, and that they are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, chain_names, relative_error, run
from torch import Tensor, nn

import mfx

GAMMA = 0.7
Rearrange = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """x + f(x), then x + g(x) between ``there`` and ``back``."""

    def __init__(self, there: Rearrange, back: Rearrange, inner: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.2))
        self.g = nn.Sequential(nn.Linear(inner, inner), nn.Tanh())
        self.there, self.back = there, back

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        r = self.there(x)
        return self.back(r + self.g(r))


class Stack(nn.Module):
    def __init__(self, there: Rearrange, back: Rearrange, inner: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(there, back, inner) for _ in range(depth)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tokens() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)


def by_hand(model: Any, x: Tensor) -> Tensor:
    v = torch.zeros_like(x)
    for layer in model.layers:
        for branch in (layer.f, lambda x, layer=layer: layer.back(layer.g(layer.there(x)))):
            v = GAMMA * v + (1 - GAMMA) * branch(x)
            x = x + v
    return x


UNDONE: dict[str, tuple[Rearrange, Rearrange, int]] = {
    "reshape": (lambda x: x.reshape(-1, 6), lambda x: x.view(2, 4, 6), 6),
    "flatten": (lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (2, 4)), 6),
    "transpose": (lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2), 4),
    "permute": (lambda x: x.permute(1, 2, 0), lambda x: torch.permute(x, (2, 0, 1)), 2),
    "both": (lambda x: x.view(2, 2, 2, 6).flatten(1, 2).transpose(1, 2), lambda x: x.transpose(1, 2).view(2, 4, 6), 4),
    "unsqueeze": (lambda x: x.unsqueeze(1), lambda x: x.squeeze(1), 6),
}


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("kind", UNDONE)
def test_a_rearrangement_that_is_undone_does_not_part_a_chain(kind, capture):
    model, x = Stack(*UNDONE[kind]), tokens()
    options: dict[str, Any] = {"example_inputs": x, "capture": capture}
    mm = mfx.momentumize(model, GAMMA, **options)
    assert [len(chain) for chain in chain_names(mm)] == [6]
    assert_same(run(mm, x), run(mfx.momentumize(model, GAMMA, reversible=False, **options), x), 1e-9)
    assert relative_error(mm.eval()(x), by_hand(model.eval(), x)) < 1e-12
    assert_same(run(mfx.momentumize(model.train(), 0.0, **options), x), run(model, x))


NOT_UNDONE: dict[str, tuple[Rearrange, Rearrange, int]] = {
    "another order": (lambda x: x.transpose(0, 1), lambda x: x.reshape(2, 4, 6), 6),
    "by keyword": (lambda x: torch.flatten(input=x, end_dim=1), lambda x: torch.reshape(input=x, shape=(2, 4, 6)), 6),
    "something between": (lambda x: x.reshape(-1, 6), lambda x: (2 * x).view(2, 4, 6), 6),
}


@pytest.mark.parametrize("kind", NOT_UNDONE)
def test_a_rearrangement_that_is_not_undone_parts_it(kind):
    model, x = Stack(*NOT_UNDONE[kind]), tokens()
    mm = mfx.momentumize(model, GAMMA, example_inputs=x)
    assert max(len(chain) for chain in chain_names(mm)) <= 2, "a chain goes through the rearrangement"
    assert_same(run(mfx.momentumize(model, 0.0, example_inputs=x), x), run(model, x))


def test_without_shapes_nothing_is_known_of_a_reshape():
    mm = mfx.momentumize(Stack(*UNDONE["reshape"]), GAMMA)
    assert [len(chain) for chain in chain_names(mm)] == [1] * 6


def test_a_value_between_that_others_read_leaves_its_block():
    """The flat x is handed out, with its gradient."""

    class Reads(Layer):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = x + self.f(x)
            r = x.reshape(-1, 6)
            return (r + self.g(r)).view(2, 4, 6), r.square().sum()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Reads(lambda x: x, lambda x: x, 6) for _ in range(3))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros((), dtype=x.dtype)
            for layer in self.layers:
                x, extra = layer(x)
                total = total * extra + extra
            return x * total

    model, x = Net(), tokens()
    mm = mfx.momentumize(model, GAMMA, example_inputs=x)
    assert [len(chain) for chain in chain_names(mm)] == [6]
    assert_same(run(mm, x), run(mfx.momentumize(model, GAMMA, example_inputs=x, reversible=False), x), 1e-9)
    assert_same(run(mfx.momentumize(model, 0.0, example_inputs=x), x), run(model, x))
