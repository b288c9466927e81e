"""A model's own checkpointing inside a chain is ignored, with a word; blocks that vanish are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import chain_names
from nets import Block, Net, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mfx
from mfx.model import checkpointing

GAMMA = 0.7


class Layer(Block):
    """Checkpoints itself, as Hugging Face's layers do."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 0.0)
        self.gradient_checkpointing = False

    def __call__(self, *args: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


def switch(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, Layer):
            module.gradient_checkpointing = on


def by_hand(model: Net, x: Tensor) -> Tensor:
    x = model.stem(x)
    v = torch.zeros_like(x)
    for block in model.blocks:
        v = GAMMA * v + (1 - GAMMA) * (block(x) - x)
        x = x + v
    return model.head(x)


@pytest.fixture(autouse=True)
def _told_nobody() -> None:
    checkpointing._told.clear()


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_of_the_blocks_changes_nothing(before: bool, capture: str) -> None:
    model, x = Net(block=Layer), rows()
    plain = copy.deepcopy(model)
    switch(model, before)
    if before:
        with pytest.warns(mfx.CheckpointingWarning, match="inside of them it is ignored"):
            mm = mfx.momentumize(model, GAMMA, example_inputs=x, capture=capture)
    else:
        mm = mfx.momentumize(model, GAMMA, example_inputs=x, capture=capture)
        mm(x)
        switch(mm, True)
    y = mm(x) if before else told(mm, x)
    torch.testing.assert_close(y, by_hand(plain, x))
    found = torch.autograd.grad(y.square().sum(), list(mm.parameters()))
    expected = torch.autograd.grad(by_hand(plain, x).square().sum(), list(plain.parameters()))
    torch.testing.assert_close(found, expected)
    assert all(layer.gradient_checkpointing for layer in mm.blocks), "the switches stay as they were set"


def told(mm: nn.Module, x: Tensor) -> Tensor:
    with pytest.warns(mfx.CheckpointingWarning):
        y = mm(x)
    mm(x)  # once is enough
    return y


class Stacked(Block):
    """In evaluation the sum is written in a way that is no add."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else torch.cat([x[None], (y - x)[None]]).sum(0)


def test_blocks_that_vanish_in_another_mode_are_an_error() -> None:
    mm = mfx.momentumize(Net(block=Stacked), GAMMA)
    assert len(chain_names(mm)[0]) == 3
    mm(rows())
    with pytest.raises(mfx.PlanChangedError, match=r"block 'blocks\.0' is not there; at first it was in the chain"):
        mm.eval()(rows())


def test_a_model_compiled_in_place_is_momentumized_and_copies_run_on_their_own_weights(fresh_dynamo: None) -> None:
    model, x = Net(p=0.0), rows()
    model.compile(backend="eager")
    model(x)
    mm = mfx.momentumize(model, GAMMA)
    torch.testing.assert_close(mm(x), by_hand(model, x))
    mm.compile(backend="eager")
    torch.testing.assert_close(mm(x), by_hand(model, x))
    other, halved = copy.deepcopy(mm), Net(p=0.0)
    halved.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in [*other.parameters(), *halved.parameters()]:
            parameter.mul_(0.5)
    torch.testing.assert_close(other(x), by_hand(halved, x))
