"""The drift detector: each planted fault is caught, sound models give no warning, the value is readable."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from nets import Net, rows
from torch import Tensor, nn

import mfx


class Faulty(nn.Module):
    """x + f(x) with ``fault`` applied to the value in a module that is taken whole."""

    def __init__(self, width: int, fault: type[nn.Module]) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.fault = fault()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fault(torch.tanh(self.f(x)))


class NonDeterministic(nn.Module):
    """Differs a little each time, as a sum in an order that changes; too small to see in the output."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        NonDeterministic.calls += 1
        return x * (1 + 1e-6 * NonDeterministic.calls)


class HiddenState(nn.Module):
    """A Python attribute that changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x / self.calls


class OwnGenerator(nn.Module):
    """Draws behind the back of the recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full(x.shape, 0.5, dtype=x.dtype), generator=self.generator)


FAULTS = (NonDeterministic, HiddenState, OwnGenerator)


def faulty(fault: type[nn.Module], depth: int, dtype: torch.dtype, gamma: float) -> nn.Module:
    """A model whose faults the tracer takes whole, as it would torch.nn's modules, and does not look into."""
    model = Net(depth, block=Faulty, fault=fault).to(dtype)
    home, fault.__module__ = fault.__module__, "torch.nn.modules"
    try:
        return mfx.momentumize(model, gamma=gamma)
    finally:
        fault.__module__ = home


@pytest.mark.parametrize("gamma", [0.9, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("depth", [3, 40])
def test_a_branch_that_does_not_repeat_itself_is_caught(fault, depth, dtype, gamma, monkeypatch):
    monkeypatch.setattr("mfx.model.state.prove", lambda *args: True)  # which finds out by itself
    mm = faulty(fault, depth, dtype, gamma)
    if fault is NonDeterministic and dtype == torch.float32 and depth == 3:
        return  # a difference below the tolerance, and nothing amplifies it
    if gamma == 0 and fault is not OwnGenerator:
        return  # what is not computed again cannot differ: see below
    loss = mm(rows().to(dtype)).sum()
    with pytest.warns(mfx.DriftWarning, match=r"momentum_0.*tolerance"):
        loss.backward()
    assert mfx.drift(mm)["momentum_0"] > (1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("fault", [NonDeterministic, HiddenState])
def test_at_gamma_0_a_number_that_changes_is_that_of_the_forward(fault, monkeypatch):
    monkeypatch.setattr("mfx.model.state.prove", lambda *args: True)
    NonDeterministic.calls = 0
    mm, x = faulty(fault, 3, torch.float64, 0.0), rows()
    found = torch.autograd.grad(mm(x).sum(), x)
    for module in mm.modules():
        if isinstance(module, HiddenState):
            module.calls = 0
    NonDeterministic.calls = 0
    plain = nn.Sequential(mm.stem, *map(copy.copy, mm.blocks), mm.head)
    assert torch.equal(*found, *torch.autograd.grad(plain(x).sum(), x))


@pytest.mark.parametrize("gamma", [0.9, 0.0])
@pytest.mark.parametrize("block", [0, 20, 39])
def test_weights_changed_through_data_are_caught_by_drift(block, gamma):
    model = Net(40, p=0.0).float()
    mm = mfx.momentumize(model, gamma=gamma)
    loss = mm(rows().float()).sum()
    model.blocks[block].up.weight.data.mul_(1.1)  # neither version nor storage shows it
    with pytest.warns(mfx.DriftWarning, match="weights changed through .data"):
        loss.backward()


def test_weights_changed_in_place_are_caught_by_their_version():
    model = Net(4, p=0.0).float()
    mm = mfx.momentumize(model, gamma=0.9)
    loss = mm(rows().float()).sum()
    with torch.no_grad():
        model.blocks[1].up.weight.mul_(1.1)
    with pytest.raises(mfx.BackwardError, match="changed in place"):
        loss.backward()


def test_weights_given_another_storage_are_caught_by_their_address():
    model = Net(4, p=0.0).float()
    mm = mfx.momentumize(model, gamma=0.9)
    loss = mm(rows().float()).sum()
    model.blocks[1].up.weight.data = model.blocks[1].up.weight.data * 1.1
    with pytest.raises(mfx.BackwardError, match="other values"):
        loss.backward()


@pytest.mark.parametrize("gamma", [0.99, 0.9, 0.5, 0.1, 0.01, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 2, 7, 60])
def test_a_sound_model_gives_no_warning(depth, dtype, gamma):
    mm = mfx.momentumize(Net(depth).to(dtype), gamma=gamma)
    assert mfx.drift(mm) == {}
    for _ in range(2):
        mm(rows().to(dtype)).sum().backward()
    drift = mfx.drift(mm)
    assert all(value <= (1e-10 if dtype == torch.float64 else 1e-4) for value in drift.values())
    if depth == 60:
        assert list(drift) == ["momentum_0"]


def test_exact_arithmetic_has_no_drift_at_all():
    mm = mfx.momentumize(Net(60).float(), gamma=0.5)
    mm(rows().float()).sum().backward()
    assert mfx.drift(mm) == {"momentum_0": 0.0}


@pytest.mark.parametrize("velocity", ["first", lambda chain: nn.Linear(6, 6)])
def test_a_velocity_of_its_own_is_what_the_start_is_held_against(velocity):
    model = Net(5, p=0.0).float()
    mm = mfx.momentumize(model, gamma=0.5, velocity=velocity)
    mm(rows().float()).sum().backward()
    assert mfx.drift(mm)["momentum_0"] < 1e-4
    loss = mm(rows().float()).sum()
    model.blocks[3].up.weight.data.mul_(1.5)
    with pytest.warns(mfx.DriftWarning):
        loss.backward()


def test_not_a_number_is_not_drift():  # M11
    mm = mfx.momentumize(Net(4).float(), gamma=0.9)
    x = rows().detach().float()
    x[0, 0] = float("nan")
    x[1, 0] = float("inf")
    y = mm(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mfx.DriftWarning)
        y.sum().backward()
    assert not y[:2].isfinite().any()
    assert y[2:].isfinite().all()
    assert not mm.stem.weight.grad.isfinite().all()


def test_a_value_from_a_device_is_looked_at_when_it_has_arrived(monkeypatch):
    """Without a GPU: an event that is not there yet keeps the value pending, and a forward does not wait for it."""
    from mfx.run.detector import Drift

    class Event:
        done = False

        def query(self) -> bool:
            return self.done

        def synchronize(self) -> None:
            self.done = True

    drift, event = Drift(), Event()
    drift._pending.append((torch.tensor(1.0), event, "momentum_0", 1e-4, 0))
    drift.poll()
    assert drift.value is None
    with pytest.warns(mfx.DriftWarning, match="momentum_0"):
        drift.poll(wait=True)
    assert drift.value == 1.0
    assert event.done


def test_drift_wants_a_momentumized_model():
    with pytest.raises(mfx.InputTypeError, match="momentumize"):
        mfx.drift(nn.Linear(1, 1))
