"""Together: at gamma 0 the adds of one module are one step; judged by the original model."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, run
from torch import Tensor, nn

import mfx
from mfx.memory import kept_bytes

WIDTH = 64


class Layer(nn.Module):
    """Three residual adds, batch norm and dropout alive; a mask from outside and a bias that the layers share."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.shared, self.down = shared, nn.Linear(WIDTH, WIDTH)
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.last = nn.Linear(WIDTH, WIDTH)

    def one(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.norm(self.shared(x))))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.one(x)
        x = x - 0.5 * self.down(self.drop(x * mask))
        return self.last(self.drop(x).sin()) + x


class Looks(Layer):
    """Its last add reads the state after the first."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = first = x + self.one(x)
        x = x + self.down(self.drop(x))
        return x + self.last(self.drop(x)) * first.cos()


class Reads(Layer):
    """Its later adds read a state and a branch value of the first."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        given = self.one(x)
        x = first = x + given
        x = x + self.down(self.drop(x)) * given
        return x + self.last(self.drop(x)) * first.cos()


class Gives(Layer):
    """Hands out branch values of its adds, and reads that of the layer before."""

    def forward(self, x: Tensor, mask: Tensor, lent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = self.one(x)
        x = x + (value if lent is None else value * lent)
        weights = (self.down(x) * mask).softmax(-1)
        return x + self.drop(self.last(x)) * weights, weights


class Shows(Layer):
    """Hands out the state between its adds."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = between = x + self.one(x)
        return x + self.last(self.drop(x * mask)), between


class Half(nn.Module):
    """One residual add, the only one of its module."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x)


class Halves(Layer):
    """Two modules with an add each, which are all that it has."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__(shared)
        self.first = Half(shared, self.norm, nn.Tanh(), self.drop)
        self.second = Half(self.down, nn.Tanh(), self.last)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x))


class Stack(nn.Module):
    def __init__(self, layer: type[Layer]) -> None:
        super().__init__()
        depth = 9 if layer in (Gives, Shows, Halves) else 5
        self.stem, self.shared = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layer(self.shared) for _ in range(depth))
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        given: list[Tensor] = []
        for layer in self.layers:
            found = layer(x, mask, *given[-1:]) if isinstance(layer, Gives) else layer(x, mask)
            if isinstance(found, tuple):
                x = found[0]
                given.append(found[1])
            else:
                x = found
        return x, given


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, 512, dtype=torch.float64).reshape(128, 4).requires_grad_()
    return x, torch.linspace(0, 1, WIDTH, dtype=torch.float64).requires_grad_()


def used(model: Stack) -> list[nn.Parameter]:
    """The parameters that the loss depends on."""
    down = [] if not isinstance(model.layers[0], Shows) else [p for one in model.layers for p in one.down.parameters()]
    return [one for one in model.parameters() if all(one is not other for other in down)]


LAYERS = {"plain": Layer, "looks": Looks, "reads": Reads, "gives": Gives, "shows": Shows, "halves": Halves}


@pytest.mark.parametrize("layer", LAYERS)
def test_joined_steps_are_the_original(layer: str):  # M1, M5, M6
    model = Stack(LAYERS[layer])
    mm = mfx.momentumize(model, 0.0, example_inputs=inputs())
    assert len(mfx.report(model, inputs()).rewritable) == (18 if layer in ("gives", "shows", "halves") else 15)
    for mode in (True, False):
        assert_same(run(mm.train(mode), *inputs()), run(model.train(mode), *inputs()), 1e-12)


@pytest.mark.parametrize("layer", LAYERS)
def test_watched_values_of_joined_steps_have_their_whole_gradient(layer: str):  # M13
    model, found = Stack(LAYERS[layer]), []
    for each in (mfx.momentumize(model, 0.0, example_inputs=inputs()), model):
        torch.manual_seed(1)
        kept: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out))
            for module in (*(one.last for one in model.layers), *(one.drop for one in model.layers))
        ]
        out, given = each(*inputs())
        for handle in handles:
            handle.remove()
        loss = out.square().sum() + sum(value.sin().sum() for value in (*given, *kept[::2]))
        found.append(torch.autograd.grad(loss, [*kept, *given, *used(model)], retain_graph=True))
        for value in kept:
            value.retain_grad()
        loss.backward()
        found[-1] = (*found[-1], *(value.grad for value in kept))
        model.zero_grad()
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "kept"), [("plain", 5), ("looks", 5), ("reads", 20), ("gives", 26), ("shows", 18), ("halves", 9)]
)
def test_as_many_states_are_kept_as_there_are_layers(layer: str, kept: int):  # M14
    """But where somebody reads a value from inside of one, each add keeps its own, and that value is kept as well."""
    model, given = Stack(LAYERS[layer]), inputs()
    mm = mfx.momentumize(model, 0.0, example_inputs=given)
    state = 128 * WIDTH * 8
    found, _ = kept_bytes(mm, given, lambda: mm(*given))
    assert kept <= found / state < kept + 1


def test_half_precision_under_autocast_is_that_of_the_original():
    model = Stack(Layer).float()
    for layer in model.layers:  # autocast casts a shared weight once, and its gradients are added in bfloat16
        layer.shared = nn.Linear(WIDTH, WIDTH)
    found = []
    for each in (mfx.momentumize(model, 0.0, example_inputs=[one.float() for one in inputs()]), model):
        torch.manual_seed(1)
        x, mask = (one.detach().float().requires_grad_() for one in inputs())
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = each(x, mask)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, mask, *model.layers.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_two_backwards_and_frozen_parts_of_a_layer():  # M7
    model = Stack(Layer).eval()
    model.layers[1].down.requires_grad_(False)
    mm = mfx.momentumize(model, 0.0, example_inputs=inputs())
    grads = []
    for each in (mm, model):
        loss = each(*inputs())[0].square().sum()
        model.zero_grad()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    assert model.layers[1].down.weight.grad is None


def test_another_gamma_joins_nothing():
    model, given = Stack(Layer).eval(), inputs()
    mm, other = (mfx.momentumize(model, gamma, example_inputs=given) for gamma in (0.0, 0.7))
    mfx.set_gamma(mm, 0.7)
    assert_same(run(mm.eval(), *given), run(other.eval(), *given), 1e-12)
    mfx.set_gamma(mm, 0.0)
    assert_same(run(mm, *given), run(model, *given), 1e-12)
