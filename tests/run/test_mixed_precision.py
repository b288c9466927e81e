"""Autocast, GradScaler, whole-model half precision, float64, complex inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Block, ConvNet, Net
from torch import Tensor, nn

import mfx
from mfx.model.conversion import momentum_of


class Plain(nn.Module):
    """x + f(x) without any normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def model(block: type[nn.Module], depth: int) -> nn.Module:
    torch.manual_seed(0)
    given = {"p": 0.0} if block is Block else {}
    return Net(depth, 32, block, **given).float()


def gradient(network: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = network(x).float().square().sum()
    found = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([grad.flatten().double() for grad in found])


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def plain_recurrence(network: nn.Module, gamma: float, x: Tensor) -> Tensor:
    """The stored recurrence written by hand, in the dtypes that autocast or the model give."""
    x = network.stem(x)
    v = torch.zeros_like(x)
    for block in network.blocks:
        v = gamma * v + (1 - gamma) * (block(x) - x)
        x = x + v
    return network.head(x)


class ByHand(nn.Module):
    def __init__(self, network: nn.Module, gamma: float) -> None:
        super().__init__()
        self.network, self.gamma = network, gamma

    def forward(self, x: Tensor) -> Tensor:
        return plain_recurrence(self.network, self.gamma, x)


@pytest.mark.parametrize("gamma", [0.99, 0.9, 0.7, 0.3])
@pytest.mark.parametrize("depth", [8, 24, 100])
@pytest.mark.parametrize("block", [Block, Plain])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_adds_no_error_of_its_own(dtype, block, depth, gamma):
    """Reversible against float32, at most twice what stored half precision has; both references are stored."""
    network, x = model(block, depth), torch.randn(64, 4)
    exact = gradient(mfx.momentumize(network, gamma=gamma, reversible=False), x)
    reversible = mfx.momentumize(network, gamma=gamma)
    found = gradient(reversible, x, dtype)
    stored = gradient(mfx.momentumize(network, gamma=gamma, reversible=False), x, dtype)
    by_hand = gradient(ByHand(network, gamma), x, dtype)
    assert error(found, exact) <= 2 * error(stored, exact)
    if dtype == torch.bfloat16:
        assert error(found, exact) <= 2 * error(by_hand, exact)
    assert error(found, stored) <= 1e-2
    assert mfx.drift(reversible) == {"momentum_0": 0.0}


@pytest.mark.parametrize("gamma", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype, gamma):
    network, x = model(Block, 24), torch.randn(64, 4)
    exact = gradient(mfx.momentumize(network, gamma=gamma, reversible=False), x)
    half = copy.deepcopy(network).to(dtype)
    mm = mfx.momentumize(half, gamma=gamma)
    found = gradient(mm, x.to(dtype))
    stored = gradient(mfx.momentumize(half, gamma=gamma, reversible=False), x.to(dtype))
    assert error(found, exact) <= 2 * error(stored, exact)
    assert error(found, stored) <= 1e-2
    assert mm(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_is_one_precision_up(dtype):
    mm = mfx.momentumize(model(Block, 24).to(dtype), gamma=0.9)
    (chain,) = momentum_of(mm).latest()
    assert chain.schedule(dtype).state_dtype == torch.float32
    assert chain.schedule(torch.float32).state_dtype == torch.float64
    assert chain.schedule(torch.float64).state_dtype == torch.float64
    assert chain.schedule(torch.float32, dtype).exact, "under autocast the branches are coarser than x"


def test_autocast_on_convolutions_with_batch_norm_and_dropout():
    """x is bfloat16 along the chain there, and the masks and statistics have to be those of the forward."""
    torch.manual_seed(0)
    network, x = ConvNet(12, 8).float(), torch.randn(8, 3, 6, 6)
    found, expected = [], []
    for reversible, into in ((True, found), (False, expected)):
        twin = copy.deepcopy(network)
        mm = mfx.momentumize(twin, gamma=0.8, reversible=reversible)
        torch.manual_seed(1)
        into += [gradient(mm, x, torch.bfloat16), twin.blocks[3].bn.running_mean]
    assert error(found[0], expected[0]) <= 1e-2
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_a_grad_scaler(dtype):
    """The same steps as with stored activations, and an overflow makes the scaler skip its step in both."""
    losses = []
    for reversible in (True, False):
        network = model(Block, 24)
        mm = mfx.momentumize(network, gamma=0.9, reversible=reversible)
        optimizer = torch.optim.SGD(mm.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40 if dtype == torch.float16 else 2.0**10)
        torch.manual_seed(1)
        x, y = torch.randn(64, 4), torch.randn(64, 2)
        losses.append([])
        scales = []
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = (mm(x).float() - y).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            losses[-1].append(loss.item())
        if dtype == torch.float16:
            assert scales[0] < 2.0**40, "the first step overflowed and was skipped"
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-2, atol=0)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_float64_stays_float64(autocast):
    """Autocast leaves float64 alone."""
    network, x = model(Block, 40).double(), torch.randn(8, 4, dtype=torch.float64)
    found = gradient(mfx.momentumize(network, gamma=0.9), x, autocast)
    expected = gradient(mfx.momentumize(network, gamma=0.9, reversible=False), x, autocast)
    assert error(found, expected) <= 1e-10
    assert error(found, gradient(ByHand(network, 0.9), x, autocast)) <= 1e-10


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_complex_inputs_are_refused(gamma):
    network = Net(2, block=Plain).to(torch.complex64)
    mm = mfx.momentumize(network, gamma=gamma)
    with pytest.raises(mfx.InputTypeError, match=r"complex.*exclude"):
        mm(torch.randn(3, 4, dtype=torch.complex64))
