"""verify: what it measures and notices, in which mode, on which loss; what it leaves as it was; the plot."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Block, ConvNet, Net, images, rows
from torch import Tensor, nn

import mfx
from mfx import memory
from mfx.cli import main
from mfx.memory import allocated_bytes
from mfx.run import reversible
from mfx.run.recompute import Rerun
from mfx.view import verification


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
    assert result.gradient_error > 1e-5
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


class Cut(Net):
    """Loses the stem's gradient, as a capture that lost a function of its own would."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).detach()))


class Doubled(Net):
    """The right value, and twice the stem's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.blocks(y + (y - y.detach())))


class Scaled(Net):
    """Another value by far less than a tolerance for half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.0001 * super().forward(x)


class Wasteful(Net):
    """Draws a number that it does not use."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0 * torch.rand(()).to(x))


class TwiceNormalized(ConvNet):
    """Moves a batch norm's statistics twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0 * self.blocks[0].bn(self.stem(x)).sum()


@pytest.fixture
def captured_as(monkeypatch):
    """Let a capture make another class of the model, in silence: the same parameters, another forward."""

    def use(kind: type[nn.Module]) -> None:
        def momentumized(model: nn.Module, gamma: Any, **options: Any) -> nn.Module:
            twin = copy.copy(model)
            twin.__class__ = kind
            return mfx.momentumize(twin, gamma, **options)

        monkeypatch.setattr(verification, "momentumize", momentumized)

    return use


@pytest.mark.parametrize("kind", [Net, Doubled, Scaled, Wasteful])
def test_two_runs_of_one_wrong_capture_agree_and_still_are_not_the_original(captured_as, kind):
    captured_as(kind)
    result = mfx.verify(Net(3), rows(), gamma=0.9)
    assert result.reversible_verdict == "ok"
    assert result.ok is (kind is Net)
    assert result.original_verdict.startswith("ok" if kind is Net else "NOT OK: ")
    wrong = {Net: "ok", Doubled: "gradients of ", Scaled: "outputs differ by 1.0e-04", Wasteful: "random generators"}
    assert wrong[kind] in result.original_verdict
    assert json.loads(json.dumps(result.to_dict()))["original_verdict"] == result.original_verdict
    assert result.original_verdict in str(result)


def test_a_gradient_that_only_one_side_has_is_named(captured_as):
    captured_as(Cut)
    result = mfx.verify(Net(3), rows(), gamma=0.9)
    assert not result.ok
    lost = {"stem.weight", "stem.bias", "input 0"}
    assert result.original_unmatched == dict.fromkeys(lost, "original only")
    assert all(name in result.original_verdict for name in lost)
    assert result.unmatched == {}


def test_a_gradient_that_only_the_momentumized_model_has_is_named(captured_as):
    captured_as(Net)
    result = mfx.verify(Cut(3), rows(), gamma=0.9)
    assert not result.ok
    assert result.original_unmatched["stem.bias"] == "momentumized only"


def test_statistics_that_move_twice_are_not_ok(captured_as):
    captured_as(TwiceNormalized)
    result = mfx.verify(ConvNet(3), images(), gamma=0.9)
    assert result.original_buffer_error > 1e-3
    assert "buffers differ" in result.original_verdict
    assert not result.ok


def test_gradients_that_the_reversible_run_alone_loses_are_named(monkeypatch):
    real = Rerun.differentiate

    def forgetful(self: Rerun, *given: Any) -> Any:
        grads = real(self, *given)
        return [grads[0], *([None] * (len(grads) - 1))] if self.index == 1 else grads

    monkeypatch.setattr(Rerun, "differentiate", forgetful)
    result = mfx.verify(Net(3), rows(), gamma=0.9)
    assert not result.ok
    assert result.unmatched["blocks.1.up.weight"] == "stored only"
    assert "blocks.1.up.weight" in result.reversible_verdict


class Attentive(nn.Module):
    """x + attention(x): a branch that is run as in its recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


@pytest.mark.skipif(allocated_bytes() is None, reason="the C library's allocator cannot be asked")
def test_a_leak_is_not_ok(monkeypatch):
    """The allocator sees a cycle of nodes that save their own results; saved tensors do not show it (M14)."""

    @contextlib.contextmanager
    def leaking(step: Any) -> Iterator[None]:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            yield

    model, x = nn.Sequential(*(Attentive() for _ in range(4))), torch.randn(8, 32, 32)
    sound = mfx.verify(model, x)
    assert sound.memory_verdict == "ok"
    assert sound.allocated_bytes is not None
    assert sound.allocated_bytes_stored is not None
    assert sound.predicted_bytes - 4096 <= sound.allocated_bytes < sound.allocated_bytes_stored / 3
    monkeypatch.setattr(reversible, "as_recomputed", leaking)
    result = mfx.verify(model, x)
    assert result.saved_bytes == sound.saved_bytes
    assert result.reversible_verdict == result.original_verdict == "ok"
    assert "more are alive than predicted" in result.memory_verdict
    assert "behind" in result.memory_verdict
    assert not result.ok


def test_where_the_allocator_cannot_be_asked_memory_is_not_measured(monkeypatch):
    monkeypatch.setattr(memory, "_heap", lambda: None)
    result = mfx.verify(Net(2), rows())
    assert (result.allocated_bytes, result.leaked_bytes) == (None, None)
    assert result.memory_verdict == "not measured"
    assert result.ok
    assert "not measured" in str(result)


class Kept32(Block):
    """Its middle stays in float32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.up(self.norm(x.float()))
        return x + self.down(F.gelu(y))


class LostIsland(Kept32):
    """The same as a capture that loses the region."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x.float()))))


def test_an_autocast_region_that_is_lost_shows_under_a_tolerance_for_half_precision(monkeypatch):
    def momentumized(model: nn.Module, gamma: Any, **options: Any) -> nn.Module:
        twin = copy.deepcopy(model)
        for block in twin.blocks:
            block.__class__ = LostIsland
        return mfx.momentumize(twin, gamma, **options)

    monkeypatch.setattr(verification, "momentumize", momentumized)
    with torch.autocast("cpu", torch.bfloat16):
        result = mfx.verify(Net(3, block=Kept32).float(), rows().float())
    assert result.original_gradient_error <= result.tolerance
    assert "outputs differ" in result.original_verdict
    assert not result.ok


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": {"blocks.1": 0.5, "*": 0.9}},
        {"gamma": {"blocks.[01]": 0.5}},
        {"velocity": "first"},
        {"velocity": lambda chain: nn.Linear(6, 6, dtype=torch.float64)},
        {"exclude": "blocks.1"},
        {"modules": "blocks.*"},
        {"state_dtype": torch.float64},
        {"capture": "dynamo"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_options_hold_in_every_comparison(options):
    network = Net(4, p=0.3)
    result = mfx.verify(network, rows(), **options)
    assert result.ok, str(result)
    assert result.original_output_error <= 1e-14
    assert set(result.original_gradient_errors) == {*dict(network.named_parameters()), "input 0"}
    assert ("momentum_velocity.0.weight" in result.gradient_errors) is callable(options.get("velocity"))


def test_a_finer_state_than_the_models_is_held_against_the_stored_run_alone():
    result = mfx.verify(Net(4).bfloat16(), rows().bfloat16(), gamma=0.9, state_dtype=torch.float64)
    assert result.original_output_error == 0.0
    assert result.ok


def test_buffers_that_are_replaced_and_generators_are_afterwards_as_before():
    model, x, before = Net(2, p=0.0), rows(), random.getstate()
    model.register_buffer("calls", torch.zeros(()))
    calls, state = model.calls, torch.get_rng_state()

    def loss(output: Tensor) -> Tensor:
        model.calls.add_(1)
        model.calls = model.calls + 1
        return output.sum() * random.random()

    assert mfx.verify(model, x, loss=loss).original_gradient_error == 0.0
    assert model.calls is calls
    assert float(calls) == 0.0
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), state)


class Cache:
    """What a model hands out beside its value, as no tree of tensors."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys


class Caching(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.blocks(self.stem(x))
        return {"value": self.head(y), "cache": Cache([y])}


def test_tensors_in_objects_that_the_model_returns_count_as_outputs():
    result = mfx.verify(Caching(2), rows())
    assert result.ok
    assert result.original_output_error == 0.0


def test_the_command_line_says_by_its_status_whether_all_is_well(captured_as, capsys):
    arguments = ["verify", "nets:Net", "--input", "5,4", "--dtype", "float64"]
    assert main(arguments) == 0
    assert "against the original at gamma = 0" in capsys.readouterr().out
    captured_as(Scaled)
    assert main(arguments) == 1
    assert "NOT OK: outputs differ by 1.0e-04" in capsys.readouterr().out


def test_the_error_of_a_chain_is_that_of_its_own_parameters():
    """In float32 reversing leaves some rounding; with no parameter to look at, the error would be 0."""
    x, options = rows().detach().float(), {"state_dtype": torch.float32, "tolerance": 1e-2}
    found = mfx.verify(Net(12, p=0.0).float(), x, gamma=0.7, **options)
    (chain,) = found.chains
    assert 0 < chain.gradient_error < 1e-2


class TakesNoGradient(Net):
    """Asks its own input for a gradient (wav2vec2's feature encoder), which no value with a history can be."""

    def forward(self, x):
        x = x[:]
        x.requires_grad = True
        return super().forward(x)


def test_inputs_ask_for_no_gradient_where_the_model_does_not_take_that():
    found = mfx.verify(TakesNoGradient(2), rows().detach(), gamma=0.8, capture="dynamo")
    assert found.ok
    assert not [name for name in found.gradient_errors if name.startswith("input")]
