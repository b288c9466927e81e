"""accelerate in both orders; averaged copies, and the gamma that they have."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from nets import Net, rows
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mfx


def losses(model: nn.Module, optimizer: Any, backward: Any) -> list[float]:
    torch.manual_seed(3)
    data, found = torch.randn(4, 5, 4, dtype=torch.float64), []
    for batch in data:
        loss = model(batch).square().sum()
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("first", ["momentumize", "prepare"])
def test_accelerate_prepares_before_or_after(first: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Net()
    plain = mfx.momentumize(copy.deepcopy(model), 0.7, reversible=False)
    expected = losses(plain, torch.optim.SGD(plain.parameters(), lr=0.01), lambda loss: loss.backward())
    accelerator = accelerate.Accelerator(cpu=True)
    if first == "momentumize":
        mm = mfx.momentumize(model, 0.7)
        mm, optimizer = accelerator.prepare(mm, torch.optim.SGD(mm.parameters(), lr=0.01))
    else:
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
        mm = mfx.momentumize(prepared, 0.7)
    assert losses(mm, optimizer, accelerator.backward) == pytest.approx(expected, rel=1e-9)
    assert len(set(expected)) == 4


def averaged(mm: nn.Module) -> nn.Module:
    return AveragedModel(mm, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def exponential(mm: nn.Module) -> nn.Module:
    return pytest.importorskip("timm.utils").ModelEmaV3(mm, decay=0.5)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, averaged, exponential])


@COPIES
def test_a_copy_is_the_momentum_network_of_its_own_weights(copied: Any) -> None:
    mm, x = mfx.momentumize(Net(p=0.0), 0.7), rows()
    twin = copied(mm)
    with torch.no_grad():
        expected = mm(x)
        mm.head.weight.zero_()
        torch.testing.assert_close(twin(x), expected)


@COPIES
def test_a_copy_says_once_that_it_does_not_follow_the_gamma_of_its_model(copied: Any) -> None:
    mm, x = mfx.momentumize(Net(p=0.0), 0.0), rows()
    twin = copied(mm)
    twin(x)
    mfx.set_gamma(mm, 0.7)
    with pytest.warns(mfx.StaleGammaWarning, match=r"gamma=0\.0, as when it was made.*gamma=0\.7 now"):
        twin(x)
    twin(x)


@COPIES
def test_a_copy_whose_gamma_is_set_says_nothing_and_is_the_same_function(copied: Any) -> None:
    mm, x = mfx.momentumize(Net(p=0.0), 0.0), rows()
    twin = copied(mm)
    schedule = mfx.GammaSchedule(mm, 0.0, 0.8, steps=2)
    for _ in range(2):
        mfx.set_gamma(twin, schedule.step())
        torch.testing.assert_close(twin(x), mm(x))


def test_a_copy_of_a_model_that_is_gone_says_nothing() -> None:
    mm = mfx.momentumize(Net(p=0.0), 0.0)
    twin = copy.deepcopy(mm)
    mfx.set_gamma(mm, 0.7)
    del mm
    gc.collect()
    assert twin(rows()).shape == (5, 2)
