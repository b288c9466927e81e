"""verify: what it measures, in which mode, on which loss; what it leaves as it was; the plot."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from nets import Block, ConvNet, Net, images, rows
from torch import Tensor, nn

import mfx


class TwoChains(nn.Module):
    """Two chains with a change of width between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*(Block(4) for _ in range(3)))
        self.between = nn.Linear(4, 6)
        self.second = nn.Sequential(*(Block(6) for _ in range(5)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def test_each_chain_has_its_own_figures():
    result = mfx.verify(TwoChains(), rows(), gamma=0.8)
    assert result.ok
    assert [chain.name for chain in result.chains] == ["momentum_0", "momentum_1"]
    first, second = result.chains
    assert first.blocks == ("first.0", "first.1", "first.2")
    assert (len(first.reconstruction), len(second.reconstruction)) == (3, 5)
    for chain in result.chains:
        assert max(chain.reconstruction) <= 1e-10
        assert chain.gradient_error <= 1e-10
        assert chain.drift is not None
        assert chain.drift <= 1e-10
        assert 0 < chain.bound <= 1e-10
        assert "float64" in chain.schedule
    assert result.reconstruction_error == max(max(chain.reconstruction) for chain in result.chains)
    assert "first.1.up.weight" in result.gradient_errors
    assert 0 < result.time_ratio < 100
    assert result.saved_bytes < result.saved_bytes_stored
    assert json.loads(json.dumps(result.to_dict()))["chains"][1]["name"] == "momentum_1"
    for text in ("momentum_1: gradient error, drift", "time, reversible / stored", "verdict"):
        assert text in str(result)


def test_the_reconstruction_error_grows_towards_the_start():
    network = Net(15, p=0.0).float()
    (chain,) = mfx.verify(network, rows().float(), gamma=0.7, state_dtype=torch.float32, tolerance=1e-2).chains
    assert chain.reconstruction[0] > 10 * chain.reconstruction[-1]
    assert chain.reconstruction[0] <= chain.bound


def test_a_loss_of_the_callers_own():
    target = torch.randn(5, 2, dtype=torch.float64)
    network, x = Net(4, p=0.0), rows()
    own = mfx.verify(network, x, loss=lambda output: (output - target).square().mean())
    assert own.ok
    zero = mfx.verify(network, x, loss=lambda output: 0 * output.sum())
    assert zero.gradient_error == 0
    with pytest.raises(mfx.InputTypeError, match="one element"):
        mfx.verify(network, x, loss=lambda output: output)


@pytest.mark.parametrize("train", [True, False])
def test_the_mode_asked_for(train):
    network, modes = ConvNet(3), []
    network.train(not train)
    network.blocks[0].eval()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    flags = [module.training for module in network.modules()]
    x, state = images(), torch.get_rng_state()

    def loss(output: Tensor) -> Tensor:
        modes.append({module.training for module in network.modules()})
        return output.sum()

    assert mfx.verify(network, x, loss=loss, train=train).ok
    assert modes[0] == {train}
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_what_is_wrong_is_not_ok():
    """A state that is too coarse for a tolerance that is too large."""
    network = Net(60, p=0.0).float()
    result = mfx.verify(network, rows().float(), gamma=0.5, state_dtype=torch.float32, tolerance=0.99)
    assert result.gradient_error > 1e-4
    result = mfx.verify(network, rows().float(), gamma=0.5)
    assert result.ok
    assert result.chains[0].bound == 0.0


def test_under_autocast_the_tolerance_is_that_of_the_branches():
    with torch.autocast("cpu", torch.bfloat16):
        result = mfx.verify(Net(20, p=0.0).float(), rows().float(), gamma=0.9)
    assert result.tolerance == 1e-2
    assert result.ok


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    for suffix in ("png", "svg"):
        path = tmp_path / f"errors.{suffix}"
        mfx.verify(TwoChains(), rows()).plot(path)
        assert path.stat().st_size > 1000
    assert "momentum_1" in (tmp_path / "errors.svg").read_text() or path.stat().st_size > 5000


def test_the_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(mfx.MfxError, match=r"mfx\[plot\]"):
        mfx.verify(Net(2), rows()).plot(tmp_path / "errors.png")
