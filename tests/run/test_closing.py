"""M2, M3, M8: what a chain hands out on its way is in the graph, not beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, backward, kept_bytes, relative_error, run
from nets import ConvBlock, ConvNet, images
from torch import Tensor, nn

import mfx

F32, F64 = torch.float32, torch.float64


class Pyramid(ConvNet):
    """Hands out the states after the blocks ``shown``, and the head's value."""

    shown: tuple[int, ...] = (0, 2, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x, levels = self.stem(x), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.shown:
                levels.append(x)
        return {"levels": levels, "head": self.head(x.mean((2, 3)))}


class ByHand(nn.Module):
    """The recurrence of a Pyramid in plain autograd; the very same modules."""

    def __init__(self, model: Pyramid, gamma: float, state: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.gamma, self.state = model, gamma, state

    def forward(self, x: Tensor) -> dict[str, Any]:
        model, levels = self.model, []
        x = model.stem(x)
        dtype, x = x.dtype, x.to(self.state or x.dtype)
        v = torch.zeros_like(x)
        for index, block in enumerate(model.blocks):
            v = self.gamma * v + (1 - self.gamma) * (block(x.to(dtype)) - x.to(dtype)).to(v.dtype)
            x = x + v
            if index in model.shown:
                levels.append(x.to(dtype))
                x = levels[-1].to(x.dtype)
        return {"levels": levels, "head": model.head(x.to(dtype).mean((2, 3)))}


def pyramid(depth: int = 5, **given: Any) -> Pyramid:
    torch.manual_seed(0)
    return Pyramid(depth, **given)


def both(model: Pyramid, gamma: float, ask: Callable[[dict[str, Any]], Any], x: Tensor) -> list[Any]:
    """What ``ask`` finds in the outputs of the reversible model, and of the recurrence by hand."""
    found = []
    for each in (mfx.momentumize(model, gamma), ByHand(model, gamma)):
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(1)
        found.append(ask(each(x)))
    return found


def retained(out: dict[str, Any]) -> list[Tensor | None]:
    for level in out["levels"]:
        level.retain_grad()
    (out["head"].square().sum() + out["levels"][0].sin().sum()).backward()
    return [level.grad for level in out["levels"]]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_the_grad_of_a_level_is_what_comes_through_the_later_blocks_and_its_own_loss(gamma):
    ours, theirs = both(pyramid(), gamma, retained, images())
    assert all(grad is not None and grad.norm() > 0 for grad in theirs)
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_autograd_grad_with_respect_to_a_level(gamma, level):
    def ask(out: dict[str, Any]) -> Any:
        return torch.autograd.grad(out["head"][:, 0].sum(), out["levels"][level])

    ours, theirs = both(pyramid(), gamma, ask, images())
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_from_one_level_to_another_and_to_a_block_between_them(gamma):
    model = pyramid()

    def ask(out: dict[str, Any]) -> Any:
        wanted = [out["levels"][0], *model.blocks[1].parameters()]
        return torch.autograd.grad(out["levels"][1].square().sum(), wanted)

    ours, theirs = both(model, gamma, ask, images())
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_what_a_hook_on_a_level_returns_goes_on_to_the_blocks_before(gamma):
    model, seen = pyramid(), []

    def ask(out: dict[str, Any]) -> Any:
        out["levels"][1].register_hook(lambda grad: seen.append(grad) or grad * 0.25)
        backward(out["head"])
        return [parameter.grad for parameter in model.parameters()]

    ours, theirs = both(model, gamma, ask, images())
    assert relative_error(ours, theirs) < 1e-10
    assert relative_error(seen[0], seen[1]) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("shown", [(0,), (1, 2), (0, 1, 2, 3), (3,)])
def test_losses_on_every_output_give_every_gradient(gamma, shown):
    model = pyramid()
    model.shown = shown
    x = images()
    assert_same(run(mfx.momentumize(model, gamma), x), _named(run(ByHand(model, gamma), x)))


def _named(result: Any) -> Any:
    """A result of the recurrence by hand under the names of the model's own parameters and buffers."""
    for group in ("grads", "buffers"):
        values = getattr(result, group)
        renamed = {name.removeprefix("model."): value for name, value in values.items()}
        object.__setattr__(result, group, renamed)
    return result


def test_a_level_whose_state_is_carried_in_a_finer_dtype():
    """float32 levels of a chain whose state is float64, exact: what flows through a level passes it by no way."""
    model, x = pyramid(12).float(), images().detach().float()
    model.shown = (5,)
    found = []
    for each in (mfx.momentumize(model, 0.9, state_dtype=F64), ByHand(model, 0.9, F64)):
        torch.manual_seed(1)
        out = each(x)
        assert out["levels"][0].dtype == F32
        out["levels"][0].register_hook(lambda grad: 3 * grad)
        backward(out["head"])
        found.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    assert relative_error(*found) < 1e-4
    assert found[0][0].norm() > 0


@pytest.mark.parametrize("options", [{}, {"reversible": False}])
def test_stored_and_reversible_run_agree_on_levels_in_a_finer_dtype(options):
    model, x = pyramid(12).float(), images().detach().float()
    mm = mfx.momentumize(model, 0.9, state_dtype=F64, **options)
    torch.manual_seed(1)
    out = mm(x)
    grad = torch.autograd.grad(out["head"].square().sum(), out["levels"])
    torch.manual_seed(1)
    other = ByHand(model, 0.9, F64)(x)
    assert relative_error(grad, torch.autograd.grad(other["head"].square().sum(), other["levels"])) < 1e-4


def test_blocks_after_a_level_do_not_run_again_where_the_loss_is_on_the_level_alone():
    model = pyramid(p=0.0)
    mm, calls = mfx.momentumize(model, 0.9), []
    out = mm(images())
    for block in model.blocks:
        block.conv.register_forward_pre_hook(lambda *_: calls.append(1))
    out["levels"][1].sum().backward()
    assert len(calls) == 3, "the blocks 0, 1, 2"


def test_two_backwards_from_two_levels_in_turn():
    model = pyramid()

    def ask(out: dict[str, Any]) -> Any:
        backward(out["levels"][2], retain_graph=True)
        backward(out["levels"][0], retain_graph=True)
        backward(out["head"])
        return [parameter.grad for parameter in model.parameters()]

    ours, theirs = both(model, 0.8, ask, images())
    assert relative_error(ours, theirs) < 1e-10


def test_a_frozen_start_leaves_the_first_level_without_gradient():
    model = pyramid()
    for part in (model.stem, model.blocks[0]):
        part.requires_grad_(False)
    out = mfx.momentumize(model, 0.9)(images().detach())
    assert [level.requires_grad for level in out["levels"]] == [False, True, True]


def test_writing_to_a_level_before_backward_is_refused():
    out = mfx.momentumize(pyramid(p=0.0), 0.9)(images())
    out["levels"][1].data.add_(0)  # hidden from autograd, and changes nothing
    with torch.no_grad():
        out["levels"][1].mul_(2)
    with pytest.raises(mfx.BackwardError, match="changed in place"):
        out["head"].sum().backward()


def test_a_level_costs_its_velocity_and_a_run_of_levels_costs_nothing_beside_them():
    """In bytes that autograd keeps: x_k, which the caller has anyway, and v_k where the step before is inverted."""
    x, size = images(), 4 * 6 * 5 * 5 * 8
    kept = {}
    for shown in ((), (3,), (0, 1, 2, 3, 4, 5, 6)):
        model = pyramid(8, p=0.0)
        model.shown = shown
        kept[shown] = kept_bytes(mfx.momentumize(model, 0.9, state_dtype=F64), x)
    assert kept[3,] - kept[()] == 2 * size
    assert kept[0, 1, 2, 3, 4, 5, 6] - kept[()] == 6 * size, "8 states, of which 7 are levels, for 2"


def test_the_drift_of_a_chain_is_the_largest_of_its_segments():
    model = pyramid(p=0.0)
    model.shown = (2,)
    mm = mfx.momentumize(model, 0.9)
    out = mm(images())
    model.blocks[4].conv.weight.data.mul_(1.1)
    with pytest.warns(mfx.DriftWarning):
        out["head"].sum().backward()
    assert mfx.drift(mm)["momentum_0"] > 1e-4


class Shared(nn.Module):
    """Blocks that hand a value on to later blocks and out of the model, with levels in between."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(width) for _ in range(4))
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        first = torch.tanh(self.blocks[0].conv(x))
        a = x + first
        b = a + self.blocks[1].conv(torch.relu(a)) * first
        c = b + self.blocks[2].conv(torch.relu(b) * first + a)
        return [first, b, c + self.blocks[3].conv(c)]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("way", ["all", "last", "level"])
def test_values_of_an_earlier_segment_that_later_blocks_read(gamma, way):
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(2, 6, 5, 5, dtype=F64, requires_grad=True)
    asked = [x, *(p for n, p in model.named_parameters() if ".bn." not in n)]
    found = []
    for each in (mfx.momentumize(model, gamma), None):
        if each is None:
            v = first = torch.tanh(model.blocks[0].conv(x))
            v = (1 - gamma) * v
            a = x + v
            v = gamma * v + (1 - gamma) * model.blocks[1].conv(torch.relu(a)) * first
            b = a + v
            v = gamma * v + (1 - gamma) * model.blocks[2].conv(torch.relu(b) * first + a)
            c = b + v
            v = gamma * v + (1 - gamma) * model.blocks[3].conv(c)
            outputs = [first, b, c + v]
        else:
            outputs = each(x)
        weights = {"all": (1, 2, 3), "last": (0, 0, 1), "level": (0, 1, 0)}[way]
        loss = sum(w * out.square().sum() for w, out in zip(weights, outputs, strict=True) if w)
        found.append(torch.autograd.grad(loss, asked, allow_unused=True, retain_graph=True))
        found[-1] += torch.autograd.grad(loss, outputs[1])
    assert relative_error(*found) < 1e-10
