"""Whole layers as blocks: which adds they take in, and which stay by themselves."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, chain_names, run
from torch import Tensor, nn

import mfx
from mfx.find.whole.layers import layers_of


class Two(nn.Module):
    """Two adds."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.f(x))
        return x + torch.tanh(self.g(x))


class One(Two):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.g(self.f(x)))


class Deep(nn.Module):
    """Both adds in modules of their own, with norms after them (BERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output, self.norms = One(), One(), nn.ModuleList(nn.LayerNorm(6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[1](self.output(self.norms[0](self.attention(x))))


class InPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        x += torch.tanh(self.f(x))
        x += torch.tanh(self.g(x))
        return x


class Listed(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        for layer in self.layers:
            x = layer(x)
        return x


class Shared(Listed):
    """One layer, three times over."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layers[0](x)
        return x


class Tapped(Listed):
    """The state between the adds of the first layer leaves it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = self.layers
        between = x + torch.tanh(first.f(x))
        x = between + torch.tanh(first.g(between))
        for layer in others:
            x = layer(x)
        return x, between


def names(model: nn.Module, granularity: str = "layer", **options: object) -> list[str]:
    report = mfx.report(model, torch.randn(2, 6), granularity=granularity, **options)  # type: ignore[arg-type]
    return report.rewritable


MATCHES = {
    "adds of one forward": (lambda: Listed(Two(), Two()), ["layers.0", "layers.1"]),
    "adds of modules inside": (lambda: Listed(Deep(), Deep()), ["layers.0", "layers.1"]),
    "one add in a layer": (lambda: Listed(One(), Two()), ["layers.0", "layers.1"]),
    "a Sequential": (lambda: nn.Sequential(Two(), Two()), ["0", "1"]),
    "an element of a slice": (lambda: nn.Sequential(nn.ReLU(), Two())[1:], ["1"]),
    "one layer in three calls": (lambda: Shared(Two()), ["layers.0#0", "layers.0#1", "layers.0#2"]),
}


@pytest.mark.parametrize(("make", "blocks"), MATCHES.values(), ids=MATCHES)
def test_the_adds_of_a_layer_are_one_block(make, blocks):
    model = make().double()
    assert names(model) == blocks
    mm = mfx.momentumize(model, 0.7, granularity="layer")
    assert [name for chain in chain_names(mm) for name in chain] == blocks
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_same(run(mfx.momentumize(model, 0.0, granularity="layer"), x), run(model, x))


def test_an_add_that_is_alone_is_the_block_that_it_was():
    report = mfx.report(Listed(One(), Two()), granularity="layer")
    assert [(row.kind, row.adds) for row in report.blocks] == [("residual", 1), ("wrapped", 2)]
    assert "3 of 3 residual adds" in str(report)
    assert "1 blocks are whole layers, F(x) = layer(x) - x, of 2 residual adds" in str(report)
    assert "whole layers" not in str(mfx.report(Listed(One(), Two())))


APART = {
    "adds outside of lists": lambda: Two(),
    "adds of the model's own forward": lambda: Tapped(Two()),
    "adds that write to x": lambda: Listed(InPlace()),
}


@pytest.mark.parametrize("make", APART.values(), ids=APART)
def test_what_is_no_layer_or_cannot_be_run_again_stays_apart(make):
    model = make()
    assert names(model) == names(model, "add")
    assert len(names(model)) == 2


def test_a_state_between_the_adds_of_a_layer_can_be_handed_out():
    class Hands(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            between = x + torch.tanh(self.f(x))
            return between + torch.tanh(self.g(between)), between

    class Outside(Listed):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            (x, between), last = self.layers[0](x), self.layers[1]
            return last(x), between

    model = Outside(Hands(), Two()).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert names(model) == ["layers.0", "layers.1"]
    mm = mfx.momentumize(model, 0.6, granularity="layer")

    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model.layers

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, between = self.layers[0](x)
            v = 0.4 * (out - x)
            x = x + v
            return x + 0.6 * v + 0.4 * (self.layers[1](x) - x), between

    assert_same(run(mm, x), run(Hand(), x), 1e-9)


def test_patterns_are_about_layers():
    model = Listed(Two(), Two(), Two())
    assert names(model, exclude="layers.1") == ["layers.0", "layers.2"]
    assert names(model, gamma={"layers.[01]": 0.5}) == ["layers.0", "layers.1"]
    with pytest.raises(mfx.OptionError, match=r"layers\.1"):
        mfx.report(model, exclude="layers.1#0", granularity="layer")


def test_layers_are_what_stands_in_lists():
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), Deep()), "b": nn.ReLU()})
    assert layers_of(model) == ("a", "b", "a.0", "a.1", "a.1.norms.0", "a.1.norms.1")


def test_a_backend_knows_no_layers():
    with pytest.raises(mfx.OptionError, match="granularity='layer' needs modules"):
        mfx.backend(granularity="layer")
