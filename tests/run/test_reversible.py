"""M7, M10, M11: the reversible run's gradients are those of the stored run, in every way people ask for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, backward, chain_names, relative_error, run
from nets import Net, rows
from torch import Tensor, nn

import mfx


def pair(model: nn.Module, gamma: Any = 0.8, **options: Any) -> tuple[Any, Any]:
    """The reversible and the stored run of one model."""
    return mfx.momentumize(model, gamma, **options), mfx.momentumize(model, gamma, reversible=False, **options)


def assert_same_runs(model: nn.Module, *inputs: Any, **options: Any) -> None:
    reversible, stored = pair(model, **options)
    assert_same(run(reversible, *inputs), run(stored, *inputs))


def gradients_of(model: nn.Module, step: Callable[[nn.Module], None]) -> dict[str, Tensor | None]:
    """The gradients of all parameters after ``step(model)``, which starts without any."""
    model.zero_grad()
    torch.manual_seed(0)
    step(model)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


class Taps(Net):
    """Hands out every state, a branch value, and the end; reads a side value in each block."""

    def forward(self, x: Tensor, side: Tensor) -> dict[str, Any]:
        states, values = [], []
        x = self.stem(x)
        for block in self.blocks:
            value = block.down(block.up(x) * side)
            x = x + value
            states.append(x)
            values.append(value)
        return {"taps": states[:-1], "values": values, "head": self.head(x)}


FROZEN = {
    "everything": ".",
    "nothing but the head": r"stem|blocks",
    "the stem": "stem",
    "the first block": r"blocks\.0",
    "all but the middle block": r"stem|head|blocks\.[02]",
    "weights": "weight",
    "biases": "bias",
}


@pytest.mark.parametrize("input_asks", [True, False])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_and_inputs(frozen: str, input_asks: bool) -> None:
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.match(rf"(.*)({FROZEN[frozen]})", name) is None)
    assert_same_runs(model, rows().detach().requires_grad_(input_asks))


def test_a_parameter_frozen_after_the_capture() -> None:
    model = Net()
    reversible, stored = pair(model)
    x = rows()
    run(reversible, x)
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    assert_same(run(reversible, x), run(stored, x))


def share_a_module(model: Net) -> None:
    model.blocks[2] = model.blocks[0]


def share_a_weight(model: Net) -> None:
    model.blocks[2].up.weight = model.blocks[0].up.weight


def share_within_a_block(model: Net) -> None:
    model.blocks[1].norm.weight = model.blocks[1].norm.bias


def share_with_the_head(model: Net) -> None:
    model.head.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    model.head.bias = model.blocks[1].down.bias


@pytest.mark.parametrize("share", [share_a_module, share_a_weight, share_within_a_block, share_with_the_head])
def test_shared_parameters(share: Callable[[Net], None]) -> None:
    model = Net()
    share(model)
    assert_same_runs(model, rows())


def test_hooks_of_parameters_run_once_and_their_value_counts() -> None:
    model = Net()
    reversible, stored = pair(model)
    calls = []

    def hook(grad: Tensor) -> Tensor:
        calls.append(grad.clone())
        return grad * 2

    model.blocks[1].up.weight.register_hook(hook)
    x = rows()
    ours, theirs = run(reversible, x), run(stored, x)
    assert_same(ours, theirs)
    assert len(calls) == 2
    assert relative_error(calls[0], calls[1]) < 1e-10


def test_two_backwards_with_retain_graph() -> None:
    def step(model: nn.Module) -> None:
        out = model(torch.ones(3, 4, dtype=torch.float64))
        backward(out, 1, retain_graph=True)
        backward(out, 2)

    reversible, stored = pair(Net())
    assert relative_error(gradients_of(reversible, step), gradients_of(stored, step)) < 1e-10


@pytest.mark.parametrize("first", [0, 1])
def test_two_forwards_before_their_backwards_in_either_order(first: int) -> None:
    def step(model: nn.Module) -> None:
        outs = [model(torch.full((3, 4), value, dtype=torch.float64)) for value in (0.5, -1.0)]
        backward(outs[first], 1)
        backward(outs[1 - first], 2)

    reversible, stored = pair(Net())
    assert relative_error(gradients_of(reversible, step), gradients_of(stored, step)) < 1e-10


def test_one_backward_through_two_forwards() -> None:
    def step(model: nn.Module) -> None:
        x = torch.ones(3, 4, dtype=torch.float64)
        y = model(x)
        backward(model(x + y.sum()) * y)

    reversible, stored = pair(Net())
    assert relative_error(gradients_of(reversible, step), gradients_of(stored, step)) < 1e-10


def test_gradients_accumulate_over_steps() -> None:
    def step(model: nn.Module) -> None:
        for value in (0.5, -1.0, 2.0):
            backward(model(torch.full((3, 4), value, dtype=torch.float64)))

    reversible, stored = pair(Net())
    assert relative_error(gradients_of(reversible, step), gradients_of(stored, step)) < 1e-10


ASKED = {
    "the input": lambda model, x: [x],
    "one block": lambda model, x: list(model.blocks[1].parameters()),
    "head and stem": lambda model, x: [model.head.weight, model.stem.bias],
    "first block and input": lambda model, x: [x, model.blocks[0].up.weight],
    "everything": lambda model, x: [x, *dict(model.named_parameters()).values()],
}


@pytest.mark.parametrize("asked", ASKED)
def test_autograd_grad_of_any_subset(asked: str) -> None:
    model, x = Net(), rows()
    found = []
    for each in pair(model):
        torch.manual_seed(0)
        found.append(torch.autograd.grad(each(x).square().sum(), ASKED[asked](each, x)))
    assert relative_error(*found) < 1e-10
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("outputs", ["taps 0", "taps 1", "values 0", "values 1", "values 2", "head 0", "all"])
def test_a_loss_on_one_output_alone(outputs: str, gamma: float) -> None:
    model = Taps()
    key, _, number = outputs.partition(" ")
    x, side = rows(), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    found = []
    for each in pair(model, gamma):
        out = each(x, side)
        loss = sum(t.square().sum() for t in (*out["taps"], *out["values"], out["head"]))
        if key != "all":
            loss = out[key][int(number)].square().sum()
        found.append(torch.autograd.grad(loss, [x, side, *model.parameters()], allow_unused=True))
    assert [g is None for g in found[0]] == [g is None for g in found[1]]
    assert relative_error(*found) < 1e-10


@pytest.mark.parametrize("side_asks", [True, False])
def test_side_inputs_get_their_gradient(side_asks: bool) -> None:
    side = torch.randn(5, 12, dtype=torch.float64, requires_grad=side_asks)
    assert_same_runs(Taps(), rows(), side)


@pytest.mark.parametrize("velocity", ["zero", "first", lambda chain: nn.Linear(6, 6).double()])
def test_the_velocity_alone_may_need_a_gradient(velocity: Any) -> None:
    model = Net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(0)
    reversible = mfx.momentumize(model, 0.8, velocity=velocity)
    torch.manual_seed(0)
    stored = mfx.momentumize(model, 0.8, velocity=velocity, reversible=False)
    x = rows().detach()
    assert_same(run(reversible, x), run(stored, x))


def test_gradients_leave_last_block_first_while_the_earlier_blocks_have_none() -> None:
    model = Net(depth=4)
    mm = mfx.momentumize(model, 0.8)
    order: list[int] = []
    for index, block in enumerate(model.blocks):
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: order.append(index))
    backward(mm(rows()))
    assert order == sorted(order, reverse=True)
    assert set(order) == {0, 1, 2, 3}


def test_an_optimizer_inside_backward_steps_as_one_after_it() -> None:
    x = rows()
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    inside, after = (mfx.momentumize(model, 0.8) for model in models)

    def update(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None

    for parameter in inside.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for step in range(3):
        for each in (inside, after):
            torch.manual_seed(step)
            backward(each(x))
        torch.optim.SGD(after.parameters(), lr=0.1).step()
        after.zero_grad()
    assert relative_error(inside.state_dict(), after.state_dict()) < 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_pass_through(bad: float) -> None:
    x = rows().detach()
    x[1, 2] = bad
    reversible, stored = pair(Net(p=0.0), 0.8)
    ours, theirs = (run(each, x.clone().requires_grad_()) for each in (reversible, stored))
    for name, value in theirs.outputs.items():
        assert torch.equal(value.isnan(), ours.outputs[name].isnan())
        assert value.isnan().any()
    for name, grad in theirs.grads.items():
        assert torch.equal(grad.isfinite(), ours.grads[name].isfinite()), name
    assert not ours.grads["stem.weight"].isfinite().any()


def test_an_infinite_parameter_shows_in_the_gradients() -> None:
    model = Net(p=0.0)
    with torch.no_grad():
        model.blocks[1].down.bias[0] = float("inf")
    reversible, stored = pair(model)
    x = rows()
    ours, theirs = run(reversible, x), run(stored, x)
    assert all(torch.equal(ours.grads[n].isfinite(), g.isfinite()) for n, g in theirs.grads.items())


class Chunks(nn.Module):
    """A branch that computes several values at once, of which one leaves it alone."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.both = nn.Linear(width, 2 * width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor, total: Any) -> tuple[Tensor, Any]:
        one, two = self.both(x).chunk(2, -1)
        return x + self.down(one), total + two.square().sum()


class Largest(Chunks):
    """The same with the named values of a maximum."""

    def forward(self, x: Tensor, total: Any) -> tuple[Tensor, Any]:
        found = self.both(x).view(-1, 6, 2).max(-1)
        return x + self.down(found.indices.to(x.dtype) + x), total + found.values.square().sum()


class Dictionary(Chunks):
    """The same with a module that gives a dict."""

    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            one, two = super().forward(x).chunk(2, -1)
            return {"one": one, "two": two}

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.both = self.Inner(width, 2 * width)

    def forward(self, x: Tensor, total: Any) -> tuple[Tensor, Any]:
        found = self.both(x)
        return x + self.down(found["one"]), total + found["two"].square().sum()


class ChunkNet(nn.Module):
    def __init__(self, block: Any = Chunks, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        total: Any = 0.0
        for block in self.blocks:
            x, total = block(x, total)
        return x * total


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("block", [Chunks, Largest, Dictionary])
def test_one_of_several_values_that_leaves_a_branch_keeps_its_gradient(block, capture):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    model = ChunkNet(block)
    options: dict[str, Any] = {"capture": capture, "example_inputs": x}
    assert_same(run(mfx.momentumize(model, 0.0, **options), x), run(model, x))
    stored = mfx.momentumize(model, 0.7, reversible=False, **options)
    mm = mfx.momentumize(model, 0.7, **options)
    assert [len(chain) for chain in chain_names(mm)] == [3]
    assert_same(run(mm, x), run(stored, x), 1e-9)


def test_several_values_that_leave_a_branch_together_are_refused():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(6, 6)
            self.double()

        def forward(self, x: Tensor) -> Any:
            found = self.inner(x)
            return x + found[0], found

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    mm = mfx.momentumize(Both(), 0.7)
    with pytest.raises(mfx.BackwardError, match="hands out tensors inside a tuple, and their gradients would be lost"):
        mm(x)


class Named(nn.Module):
    """x + f(the larger of pairs, by the name that torch.max gives it, and x)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).view(-1, 6, 2).max(-1).values + x)


def test_an_attribute_of_a_value_is_part_of_the_branch():
    model, x = Net(3, block=Named), rows()
    for gamma in (0.0, 0.7):
        mm = mfx.momentumize(model, gamma)
        assert [len(chain) for chain in chain_names(mm)] == [3]
        assert_same(run(mm, x), run(mfx.momentumize(model, gamma, reversible=False), x), 1e-9)
    assert_same(run(mfx.momentumize(model, 0.0), x), run(model, x))


class Modulated(nn.Module):
    """x + f(x) scaled and shifted by two values from outside, which come together; its own two likewise."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.own = nn.Linear(width, 2 * width)
        self.f = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.2))

    def forward(self, x: Tensor, pair: Any, condition: Tensor) -> Tensor:
        scale, shift = self.own(condition).chunk(2, -1)
        return x + self.f(x * scale + shift) * pair[0] + pair[1] * 0


class Modulation(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.outer = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(Modulated() for _ in range(depth))
        self.double()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        pair = self.outer(condition).chunk(2, -1)
        for block in self.blocks:
            x = block(x, pair, condition)
        return x


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_one_of_several_values_from_outside_gets_its_gradient(capture):
    model = Modulation()
    x, condition = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    given: dict[str, Any] = {"example_inputs": (x, condition), "capture": capture}
    mm = mfx.momentumize(model, 0.0, **given)
    assert sum(map(len, chain_names(mm))) == 3
    assert_same(run(mm, x, condition), run(model, x, condition))
    mm, stored = (mfx.momentumize(model, 0.7, reversible=flag, **given) for flag in (True, False))
    assert_same(run(mm, x, condition), run(stored, x, condition), 1e-9)


class Fixed(nn.Module):
    """x + f(x) that trains a bias alone, so that autograd saves no x of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.f.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Scales(Net):
    """Writes to states that it has handed on to the next block."""

    def forward(self, x: Tensor) -> Tensor:
        x, states = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return self.head(x).sum() + sum(state.mul_(n + 2).sum() for n, state in enumerate(states[:2]))


@pytest.mark.parametrize("whole", [None, "blocks.?"])
def test_at_gamma_0_states_may_be_written_to_where_the_model_may(whole: str | None) -> None:
    model, x = Scales(4, block=Fixed), rows()
    assert_same(run(mfx.momentumize(model, 0.0, modules=whole), x), run(model, x))
