"""M12: what a model's Python keeps outside of the model is no part of a symbolic graph, and is not lost in silence."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from nets import rows
from torch import Tensor, nn

import mfx

ELSEWHERE: list[Tensor] = []


class Auxiliary(nn.Module):
    """x + tanh(f(x)), with a loss of its own in a global list."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        ELSEWHERE.append(h.square().mean())
        return x + torch.tanh(h)


def model() -> nn.Sequential:
    return nn.Sequential(*(Auxiliary() for _ in range(3))).double()


@pytest.fixture
def x() -> Tensor:
    ELSEWHERE.clear()
    return rows(5).double()[:, :4]


def test_a_value_in_a_global_list_is_refused_by_name(x: Tensor) -> None:
    with pytest.raises(mfx.CaptureError, match=r"keeps 'mean\w*' \(of module '0'\) in a global, a closure"):
        mfx.momentumize(model(), capture="fx")


def test_dynamo_gives_it_with_its_whole_gradient(x: Tensor) -> None:
    net, found = model(), []
    mm = mfx.momentumize(net, 0.0, example_inputs=x)
    for each in (net, mm):
        ELSEWHERE.clear()
        loss = each(x).square().sum() + sum(ELSEWHERE)
        assert len(ELSEWHERE) == 3
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    torch.testing.assert_close(found[1], found[0])


def test_what_is_kept_for_the_length_of_the_forward_alone_is_let_through(x: Tensor) -> None:
    class Cached(nn.Module):
        """Holds its values in a cycle and in a cache of its own until it returns."""

        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            @functools.lru_cache
            def value(scale: float) -> Tensor:
                return self.f(x) * scale

            cycle: list[object] = [value(2.0)]
            cycle.append(cycle)
            return x + torch.tanh(value(2.0))

    net = nn.Sequential(Cached(), Cached()).double()
    mm = mfx.momentumize(net, 0.0, capture="fx")
    torch.testing.assert_close(mm(x), net(x))


class Unpacks(Auxiliary):
    """Torch's own symbolic value leaves a cycle where it is unpacked."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        return x + torch.tanh(self.f(x)).reshape(rows, columns)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_cycle_that_is_garbage_is_nobodys_value(x: Tensor, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process had frozen, or had not, is so afterwards."""
    before = gc.get_freeze_count()
    monkeypatch.setattr("mfx.memory._Frozen.by_others", False)
    gc.freeze() if frozen else gc.unfreeze()
    count = gc.get_freeze_count()
    try:
        network = nn.Sequential(Unpacks(), Unpacks()).double()
        mm = mfx.momentumize(network, 0.0, capture="fx")
        assert torch.equal(mm(x), network(x))
        assert (gc.get_freeze_count() == 0) == (count == 0)
    finally:
        if before:
            gc.freeze()
