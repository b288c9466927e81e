"""Recurrent layers in the branches of a model that Dynamo captures, dropout between their layers alive."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, chain_names, run
from recurrence import by_hand
from torch import Tensor, nn

import mfx


class Block(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.out = kind(6, 6, 2, dropout=0.3, batch_first=True), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.rnn(x)[0])


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_a_part_of_the_branch(kind, gamma):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block(kind) for _ in range(3))).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    mm = mfx.momentumize(blocks, gamma, example_inputs=x, capture="dynamo")
    assert [len(chain) for chain in chain_names(mm)] == [3]
    for training in (True, False):
        mm.train(training), blocks.train(training)
        assert_same(run(mm, x), by_hand(blocks, gamma, x), 1e-10)
