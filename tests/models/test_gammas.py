"""gamma by tensors and modules, against recurrences written by hand: its gradient too; batch norm and dropout alive."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from by_rule import TOLERANCE, ByRule, Net, both, named_as_the_net, x_of
from helpers import assert_same, relative_error, run
from torch import Tensor, nn

import mfx


def tensor(*shape: int, low: float = 0.3, high: float = 0.95) -> Tensor:
    values = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return low + (high - low) * values


def hand(net: Net, gamma: Tensor, readout: str) -> ByRule:
    """The recurrence by ``gamma``, one for each block or for all."""
    of = (lambda k: gamma[k]) if gamma.dim() == 1 else (lambda k: gamma)
    coast = (lambda k: of(k) / (1 - of(k))) if readout == "z" else 0.0
    return ByRule(net, lambda k: (of(k), 1 - of(k)), coast=coast)


VALUES = {
    "one": torch.tensor(0.8, dtype=torch.float64),
    "a block": tensor(8),
    "a sample": tensor(5, 1),
    "both signs": tensor(5, 1, low=-0.9, high=0.9),
    "an element": tensor(5, 6),
    "zeros among them": torch.tensor([0.5, 0.0, 0.9, -0.3, 0.0, 0.0, 0.7, -1.0], dtype=torch.float64),
}


@pytest.mark.parametrize("gamma", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("readout", ["x", "z"])
@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
def test_gamma_is_a_tensor(gamma: Tensor, readout: str, learned: bool) -> None:
    """Gradients of all parameters, of x, and of gamma itself where it is a parameter."""
    net = Net(taps=(1,)).double()
    asked = nn.Parameter(gamma.clone()) if learned else gamma
    options = {"gamma": asked, "readout": readout}
    # Written on grids the state is as exact as the tolerance asks for, and so is what follows from it.
    tolerance = 1e-7 if gamma.numel() > 8 else TOLERANCE
    x, by_hand = x_of(net), hand(net, asked, readout)
    if learned:
        by_hand.register_parameter("gamma", asked)
    wanted = named_as_the_net(run(by_hand, x))
    of_gamma = wanted.grads.pop("gamma", None)
    for reversible in (True, False):
        found = run(mfx.momentumize(net, example_inputs=x, reversible=reversible, **options), x)
        found.buffers.pop("momentum_gamma.0.value", None)
        got = found.grads.pop("momentum_gamma.0.value", None)
        assert (got is None) == (of_gamma is None) == (not learned)
        assert_same(found, wanted, tolerance)
        assert not learned or relative_error(got, of_gamma) < tolerance


def test_a_learned_gamma_is_right_by_finite_differences() -> None:
    net = Net().double().eval()
    mm = mfx.momentumize(net, mfx.LearnedGamma(0.6))
    raw, x = mm.momentum_gamma["0"].raw, x_of(net).detach()
    mm.double()
    assert raw.shape == (8,)

    def loss(values: Tensor) -> Tensor:
        with torch.no_grad():
            raw.copy_(values)
        return mm(x)[0].square().sum()

    at = raw.detach().clone()
    (found,) = torch.autograd.grad(loss(at), raw)
    with torch.no_grad():
        steps = 1e-5 * torch.eye(8, dtype=torch.float64)
        expected = torch.stack([(loss(at + step) - loss(at - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_gamma_has_its_gradient_in_low_precision(dtype: torch.dtype) -> None:
    """Forty blocks and more than one kept state: the reversible run's gradient of gamma is the stored run's."""
    net = Net(20).to(dtype)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for reversible in (True, False):
        mm = mfx.momentumize(net, nn.Parameter(torch.full((40,), 0.6)), reversible=reversible)
        torch.manual_seed(0)
        out = mm(x)[0].float()
        found.append(torch.autograd.grad(out.square().sum(), mm.momentum_gamma["0"].value)[0])
    assert relative_error(*found) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert found[0].abs().min() > 0


def test_what_is_learned_belongs_to_the_model() -> None:
    net = Net()
    mm = mfx.momentumize(net, mfx.LearnedGamma(0.9))
    assert [key for key in mm.state_dict() if key not in net.state_dict()] == ["momentum_gamma.0.raw"]
    assert torch.allclose(torch.sigmoid(mm.momentum_gamma["0"].raw), torch.tensor(0.9))
    optimizer, x = torch.optim.Adam(mm.parameters(), lr=0.1), torch.randn(5, 6)
    before = mm.momentum_gamma["0"].raw.detach().clone()
    mm(x)[0].square().sum().backward()
    optimizer.step()
    assert (mm.momentum_gamma["0"].raw != before).all()
    mm.eval()
    for copied in (copy.deepcopy(mm), pickle.loads(pickle.dumps(mm))):
        assert torch.equal(copied(x)[0], mm(x)[0])


def test_random_signs_are_drawn_anew_and_the_plain_network_is_left_in_eval_mode() -> None:
    """BDIA: in train mode the recurrence by the very signs that were drawn; in eval mode the original, bit for bit."""
    net = Net().double()
    x, drawn = x_of(net), []
    mm = mfx.momentumize(net, mfx.RandomSign(0.5), example_inputs=x)
    mm.momentum_gamma["0"].register_forward_hook(lambda module, args, out: drawn.append(out))
    found = run(mm, x)
    torch.manual_seed(0)
    shape = (8, 5, 1)
    assert drawn[-1].shape == shape
    assert set(drawn[-1].unique().tolist()) == {-0.5, 0.5}
    signs = drawn[-1].double()

    class Hand(ByRule):
        def forward(self, x: Tensor) -> list[Tensor]:
            torch.randint(0, 2, shape)  # what the module draws first
            return super().forward(x)

    assert_same(found, named_as_the_net(run(Hand(net, lambda k: (signs[k], 1 - signs[k])), x)), TOLERANCE)
    run(mm, x, seed=1)
    assert not torch.equal(drawn[-1], drawn[-2])
    mm.eval(), net.eval()
    assert_same(run(mm, x), run(net, x))
    assert_same(run(mfx.momentumize(net, mfx.RandomSign(0.5)), x), run(net, x))


def test_random_signs_keep_no_more_with_depth() -> None:
    """In exact arithmetic each sample's sign is part of the grid, so that snapshots are as for gamma = 0.5."""
    x = torch.randn(4, 6)
    plans = []
    for gamma in (0.5, mfx.RandomSign(0.5)):
        mm = mfx.momentumize(Net(15), gamma, state_dtype=torch.float64)
        with mfx_states() as seen:
            mm(x)[0].sum().backward()
        plans.append(seen["momentum_0"].snapshots)
        assert mfx.drift(mm)["momentum_0"] == 0.0
    assert len(plans[0]) == len(plans[1])


def mfx_states() -> Any:
    """The schedule that each chain runs by, by its name."""
    from contextlib import contextmanager

    from mfx.run.tape import observing

    @contextmanager
    def seeing() -> Any:
        seen: dict[str, Any] = {}
        with observing(lambda *state: None, lambda chain, plan: seen.setdefault(chain, plan)):
            yield seen

    return seeing()


@pytest.mark.parametrize("factory", [mfx.LearnedGamma(0.8), mfx.RandomSign(0.5)], ids=str)
def test_compiled_what_gives_gamma_is_asked_in_both_modes(factory: Any) -> None:
    torch._dynamo.reset()
    net = Net().double()
    net.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
    mm = mfx.momentumize(net, factory)
    compiled = torch.compile(mm, backend="aot_eager", fullgraph=True)
    x = x_of(net)
    for train in (True, False, True):
        mm.train(train)
        found, wanted = run(compiled, x), run(mm, x)
        assert relative_error(found.outputs, wanted.outputs) < TOLERANCE
        assert relative_error(list(found.grads.values()), list(wanted.grads.values())) < TOLERANCE


def test_verify_shares_what_gives_gamma() -> None:
    net = Net().double()
    for gamma in (mfx.LearnedGamma(0.8), mfx.RandomSign(0.5), tensor(5, 1), nn.Parameter(tensor(8))):
        assert mfx.verify(net, x_of(net), gamma).ok


def test_both_gives_what_it_is_named_for() -> None:
    """A gamma that is not the recurrence's is noticed."""
    net = Net().double()
    with pytest.raises(AssertionError):
        both(net, {"gamma": torch.tensor(0.8, dtype=torch.float64)}, ByRule(net, (0.81, 0.19)))


class Wrong(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value


REFUSED = {
    "one too few": (lambda: torch.full((7,), 0.5), mfx.OptionError, "7 values, and 8 blocks"),
    "of another batch": (lambda: torch.full((4, 1), 0.5), mfx.ShapeError, r"one value a sample is of shape \(5, 1\)"),
    "above 1": (lambda: torch.full((5, 1), 1.5), mfx.OptionError, "gamma=1.5"),
    "not a number": (lambda: torch.full((8,), torch.nan), mfx.OptionError, "NaN"),
    "whole numbers": (lambda: torch.ones(8, dtype=torch.long), mfx.InputTypeError, "floating"),
    "no tensor from a module": (lambda: lambda chain: Wrong(0.5), mfx.InputTypeError, "tensor of floating numbers"),
    "no number a block": (lambda: lambda chain: Wrong(torch.rand(3)), mfx.ShapeError, "one entry for each of its 8"),
    "out of range from a module": (lambda: lambda chain: Wrong(torch.full((8,), 1.0)), mfx.OptionError, "'layers.0#0'"),
    "NaN from a module": (lambda: lambda chain: Wrong(torch.full((8,), torch.nan)), mfx.OptionError, "'layers.0#0'"),
}


@pytest.mark.parametrize(("gamma", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_a_gamma_that_cannot_be_is_refused(gamma: Any, error: type[Exception], says: str) -> None:
    net = Net().double()
    with pytest.raises(error, match=says):
        mfx.momentumize(net, gamma())(x_of(net))


def test_what_does_not_go_with_modules_that_give_gamma_is_refused() -> None:
    net = Net()
    x, gamma = torch.randn(5, 6), mfx.LearnedGamma()
    mm = mfx.momentumize(net, gamma)
    for call, says in (
        (lambda: mfx.set_gamma(mm, 0.5), "given by modules"),
        (lambda: mfx.GammaSchedule(mm, 0.0, gamma, steps=2), "no float or mapping"),
        (lambda: mfx.backend(gamma=gamma), "no model to register them on"),
        (lambda: mfx.momentumize(net, gamma, activation_budget=0.5, example_inputs=x), "activation_budget"),
        (lambda: mfx.momentumize(net, gamma, rule="midpoint"), "does not go with"),
        (lambda: mfx.chains(mm)[0].forward(x), "no one function"),
        (lambda: mfx.LearnedGamma(1.0), "between 0 and 1"),
        (lambda: mfx.RandomSign(0.0), "above 0 and below 1"),
    ):
        with pytest.raises(mfx.OptionError, match=says):
            call()


@pytest.mark.parametrize("gamma", [torch.tensor(0.5), torch.full((8,), 0.5), mfx.LearnedGamma()], ids=str)
def test_a_model_is_not_given_a_tensor_for_gamma_afterwards(gamma: Any) -> None:
    with pytest.raises(mfx.InputTypeError, match=r"are for momentumize\(model, gamma=...\)"):
        mfx.set_gamma(mfx.momentumize(Net()), gamma)


def test_gamma_is_taken_as_it_was_in_forward() -> None:
    """A step of an optimizer between forward and backward, and a second backward, change no gradient."""
    net = Net().double().eval()
    gamma = nn.Parameter(tensor(8))
    mm, x = mfx.momentumize(net, gamma), x_of(net)
    wanted = torch.autograd.grad(hand(net, gamma, "x")(x)[0].sum(), [gamma, *net.layers.parameters()])
    out = mm(x)[0].sum()
    with torch.no_grad():
        gamma.mul_(0.5)
    for keep in (True, False):
        found = torch.autograd.grad(out, [gamma, *net.layers.parameters()], retain_graph=keep)
        assert relative_error(list(found), list(wanted)) < TOLERANCE


def test_under_transforms_gamma_is_what_the_module_gives() -> None:
    net = Net().double().eval()
    mm = mfx.momentumize(net, gamma=nn.Parameter(tensor(8)))
    parameters = dict(mm.named_parameters())
    x = x_of(net).detach()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(mm, parameters, (x,))[0].sum()

    found = torch.func.grad(loss)(parameters)
    wanted = torch.autograd.grad(mm(x)[0].sum(), list(parameters.values()))
    assert relative_error(list(found.values()), list(wanted)) < TOLERANCE


class Pushed(nn.Module):
    """A first velocity that is learned."""

    def __init__(self, chain: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def test_velocity_and_gamma_are_learned_together() -> None:
    net, gamma = Net().double(), nn.Parameter(tensor(8))
    mm = mfx.momentumize(net, gamma, velocity=Pushed)
    first, x = mm.momentum_velocity["0"], x_of(net)
    asked = [gamma, *first.parameters(), *net.parameters()]

    def by_hand() -> Tensor:
        y, v, k = x, first(x), 0
        for layer in net.layers:
            for branch in (layer.attend, layer.feed):
                v = gamma[k] * v + (1 - gamma[k]) * branch(y)
                y, k = y + v, k + 1
        return net.head(y)

    torch.manual_seed(1)
    found = torch.autograd.grad(mm(x)[0].square().sum(), asked)
    torch.manual_seed(1)
    wanted = torch.autograd.grad(by_hand().square().sum(), asked)
    assert relative_error(list(found), list(wanted)) < TOLERANCE
