"""Rearranging: what comes to nothing, and what does not."""

from __future__ import annotations

import pytest
import torch
from graphs import Part, case, found
from helpers import assert_same, run
from torch import nn

import mfx
from mfx.graph.rearranging import source

X = torch.ones(2, 3, 4, dtype=torch.float64)


def last(forward, example):
    """The value that the model gives, and the one behind it."""
    flow = found(forward, {}, example).flow
    (node,) = flow.graph.output_node().all_input_nodes
    return node, source(node, flow.root)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("two slices", lambda self, x: torch.cat([(y := self.f(x))[:, :1], y[:, 1:]], 1)),
        case("slices from the end", lambda self, x: torch.cat([(y := self.f(x))[:, :-1], y[:, -1:]], 1)),
        case("slices at a size", lambda self, x: torch.cat([(y := self.f(x))[: (n := x.shape[0] - 1)], y[n:]])),
        case("three slices", lambda self, x: torch.cat([(y := self.f(x))[:, :1], y[:, 1:2], y[:, 2:]], dim=1)),
    ],
)
def test_all_slices_in_order_are_the_value(forward, parts, known):
    _, behind = last(forward, X if known else None)
    assert behind.name == "f"


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("the other order", lambda self, x: torch.cat([(y := self.f(x))[:, 1:], y[:, :1]], 1)),
        case("a gap", lambda self, x: torch.cat([(y := self.f(x))[:, :1], y[:, 2:]], 1)),
        case("no end", lambda self, x: torch.cat([(y := self.f(x))[:, :1], y[:, 1:2]], 1)),
        case("another dimension", lambda self, x: torch.cat([(y := self.f(x))[:1], y[1:]], 1)),
        case("every second", lambda self, x: torch.cat([(y := self.f(x))[:, :1], y[:, 1::2]], 1)),
        case("two values", lambda self, x: torch.cat([self.f(x)[:, :1], self.g(x)[:, 1:]], 1)),
        case("overlapping", lambda self, x: torch.cat([(y := self.f(x))[:, :2], y[:, 2:1], y[:, 1:]], 1)),
        case("sliced twice", lambda self, x: torch.cat([(y := self.f(x))[:, :1, :2], y[:, 1:, :2]], 1)),
        case("transposed once", lambda self, x: self.f(x).transpose(1, 2)),
        case("transposed otherwise", lambda self, x: self.f(x).transpose(0, 1).transpose(0, 2)),
        case("reshaped otherwise", lambda self, x: self.f(x).reshape(3, 2, 4)),
        case("copied in another order", lambda self, x: self.f(x).transpose(1, 2).reshape(2, 3, 4)),
    ],
)
def test_other_rearrangements_are_other_values(forward, parts):
    node, behind = last(forward, X)
    assert behind is node


def test_equal_sizes_in_another_order_are_another_value():
    node, behind = last(lambda self, x: self.f(x).transpose(0, 1).transpose(1, 2), torch.ones(4, 4, 4).double())
    assert behind is node


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("transposed twice", lambda self, x: self.f(x).transpose(1, 2).transpose(2, 1)),
        case("flattened", lambda self, x: self.f(x).flatten(1).view(2, 3, 4)),
        case("both", lambda self, x: self.f(x).permute(2, 0, 1).unsqueeze(1).squeeze(1).permute(1, 2, 0)),
    ],
)
def test_rearrangements_that_undo_each_other_are_the_value(forward, parts):
    _, behind = last(forward, X)
    assert behind.name == "f"


class Stage(nn.Module):
    """Pictures outside, tokens inside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Part(lambda self, x: x + torch.tanh(self.f(x))) for _ in range(2))
        self.drop = nn.Dropout(0.4)

    def forward(self, x):
        n, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = self.drop(block(x))
        return x.transpose(1, 2).reshape(n, c, h, w)


class Single(nn.Module):
    """Takes two parts of the tokens, works on all, and gives the parts (the single blocks of Flux)."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drop = nn.Linear(4, 4), nn.Dropout(0.4)

    def forward(self, text, image):
        n = text.shape[1]
        x = torch.cat([text, image], dim=1)
        x = x + self.drop(torch.tanh(self.f(x.cumsum(1))))
        return x[:, :n], x[:, n:]


def result_of(by_hand, x):
    result = run(by_hand, x)
    result.grads.update({name.removeprefix("of."): result.grads.pop(name) for name in [*result.grads]})
    return result


def recurrence(blocks, x, gamma):
    v = torch.zeros_like(x)
    for block in blocks:
        v = gamma * v + (1 - gamma) * (block(x) - x)
        x = x + v
    return x


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_blocks_between_rearrangements_are_one_chain(capture, gamma):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Stage() for _ in range(3))).double(), torch.randn(2, 4, 2, 3, dtype=torch.float64)

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = model

        def forward(self, x):
            n, c, h, w = x.shape
            steps = [lambda x, s=stage, b=block: s.drop(b(x)) for stage in model for block in stage.blocks]
            return recurrence(steps, x.flatten(2).transpose(1, 2), gamma).transpose(1, 2).reshape(n, c, h, w)

    mm = mfx.momentumize(model, gamma, example_inputs=x, capture=capture)
    assert [len(chain.blocks) for chain in mfx.chains(mm)] == [6]
    ours, by_hand = run(mm, x.requires_grad_()), result_of(ByHand(), x)
    assert_same(ours, by_hand, 1e-10)
    for sizes in ((3, 4, 2, 3), (3, 4, 3, 3), (1, 4, 3, 2)):  # Dynamo makes sizes that vary symbols
        x = torch.randn(sizes, dtype=torch.float64)
        assert_same(run(mm, x), result_of(ByHand(), x), 1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_blocks_whose_tokens_are_parted_and_joined_between_them_are_one_chain(capture, gamma):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Single() for _ in range(4)).double()

        def forward(self, text, image):
            for block in self.blocks:
                text, image = block(text, image)
            return text, image

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model.blocks

        def forward(self, text, image):
            n = text.shape[1]
            steps = [lambda x, b=b: torch.cat(b(x[:, :n], x[:, n:]), 1) for b in model.blocks]
            x = recurrence(steps, torch.cat([text, image], 1), gamma)
            return x[:, :n], x[:, n:]

    model = Model()
    text, image = (torch.randn(2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    mm = mfx.momentumize(model, gamma, example_inputs=(text, image), capture=capture)
    assert [len(chain.blocks) for chain in mfx.chains(mm)] == [4]
    assert_same(run(mm, text, image), run(ByHand(), text, image), 1e-10)
    assert_same(run(mm, text[:, :2], image), run(ByHand(), text[:, :2], image), 1e-10)
