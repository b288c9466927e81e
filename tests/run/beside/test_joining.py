"""M13: a value from inside a branch has its whole gradient, for whoever asks; judged by the recurrence by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mfx

WIDTH = 6


class Gives(nn.Module):
    """Hands out two values, of which the second is computed from the first, with dropout before, between and after."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)

    def branch(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        one = torch.tanh(self.norm(self.a(x)))
        two = self.b(self.drop(one)).sigmoid()
        return self.c(self.drop(two * one)), [one, two]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        value, given = self.branch(x)
        return x + value, given


class Lends(Gives):
    """What it hands out is read by the block after it, which hands out a value and its double."""

    def forward(self, x: Tensor, lent: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        value, given = self.branch(x)
        return x + (value if lent is None else value * lent), [*given, 2 * value]


class Closes(Gives):
    """relu(x + f(x)): a block that is rewritten whole."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        value, given = self.branch(x)
        return torch.relu(x + value), given


class Apart(Gives):
    """What it hands out does not come to its own value, or is that value."""

    def branch(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        value = self.c(self.drop(self.norm(self.a(x))))
        return value, [self.b(x).sin(), value, x.detach() * 2, x > 0]


class Model(nn.Module):
    def __init__(self, block: type[Gives] = Gives, depth: int = 4, taps: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks, self.taps = nn.ModuleList(block() for _ in range(depth)), taps
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        given: list[Tensor] = []
        lent: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x, each = block(x, *lent)
            lent = [each[1]] if isinstance(block, Lends) else []
            given += [*each, x] if self.taps and number == 1 else each
        return self.head(x), given


class ByHand(nn.Module):
    """The recurrence in plain autograd, on the same modules."""

    def __init__(self, model: Model, gamma: float) -> None:
        super().__init__()
        self.model, self.gamma = model, gamma

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        model = self.model
        x = model.stem(x)
        v, given, lent = torch.zeros_like(x), [], []
        for number, block in enumerate(model.blocks):
            y, each = block(x, *lent)
            lent = [each[1]] if isinstance(block, Lends) else []
            v = self.gamma * v + (1 - self.gamma) * (y - x)
            x = x + v
            given += [*each, x] if model.taps and number == 1 else each
        return model.head(x), given


Loss = Callable[[Tensor, list[Tensor]], Tensor]
LOSSES: dict[str, Loss] = {
    "the output": lambda out, given: out.square().sum(),
    "the output and all of them": lambda out, given: out.square().sum() + sum(e.sin().sum() for e in given),
    "the output and some": lambda out, given: out.square().sum() + given[1].exp().sum() + given[-1].exp().sum(),
    "them alone": lambda out, given: sum(e.sin().sum() for e in given),
    "one from the middle": lambda out, given: given[3].sin().sum(),
}
KINDS: dict[str, Callable[[], Model]] = {
    "residual": Model,
    "read by the next block": lambda: Model(Lends),
    "wrapped": lambda: Model(Closes),
    "with a tap": lambda: Model(taps=True),
    "a tap, and read": lambda: Model(Lends, taps=True),
}


def run(each: nn.Module, model: nn.Module) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The input, the output, and the values from inside that can have a gradient."""
    for buffer in model.buffers():
        buffer.zero_()
    x = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4).requires_grad_()
    torch.manual_seed(1)
    out, given = each(x)
    return x, out, [value for value in given if value.requires_grad]


def both(model: Model, gamma: float, ask: Callable[..., list[Any]], **options: Any) -> None:
    """What ``ask(model, x, out, given)`` finds is that of the recurrence by hand."""
    mm = mfx.momentumize(model, gamma, **options)
    assert len(mfx.report(model).chains) == 1
    found = [ask(model, *run(each, model)) for each in (mm, ByHand(model, gamma))]
    assert [grad is None for grad in found[0]] == [grad is None for grad in found[1]]
    for ours, theirs in zip(*found, strict=True):
        # The gradient of a bias before BatchNorm is zero, up to rounding.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def grads(loss: Tensor, of: list[Tensor], **options: Any) -> list[Any]:
    return list(torch.autograd.grad(loss, of, allow_unused=True, **options))


OPTIONS: dict[str, dict[str, Any]] = {"reversed": {}, "snapshots": {"tolerance": 1e-13}}


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_values_from_inside_is_whole(kind: str, loss: str, gamma: float):
    """By all of them and everything else, and by each alone."""

    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        total = LOSSES[loss](out, given)
        found = grads(total, [*given, x, *model.parameters()], retain_graph=True)
        for value in given:
            found += grads(total, [value], retain_graph=True)
        return found

    both(KINDS[kind](), gamma, ask)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_retain_their_gradient(kind: str, loss: str, gamma: float, options: str):
    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        model.zero_grad()
        for value in given[1::2]:
            value.retain_grad()
        LOSSES[loss](out, given).backward()
        return [tensor.grad for tensor in (*given[1::2], x, *model.parameters())]

    both(KINDS[kind](), gamma, ask, **OPTIONS[options])


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_whole_gradient_and_may_change_it(kind: str, gamma: float, alive: bool):
    """The objects of the values may be gone by then."""

    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        seen: dict[int, Tensor] = {}
        for number, value in enumerate(given):
            value.register_hook(lambda grad, number=number: seen.update({number: grad.clone()}))
            if number % 3 == 0:
                value.register_hook(lambda grad: grad.cos())
        loss = out.square().sum() + given[2].sum() + given[5].sum()
        if not alive:
            given.clear()
            del value
            gc.collect()
        found = grads(loss, [x, *model.parameters()])
        return [*(seen[number] for number in sorted(seen)), *found]

    both(KINDS[kind](), gamma, ask)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_hook_may_change_what_has_no_other_reader(gamma: float):
    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        given[4].register_hook(torch.zeros_like)
        return grads(out.square().sum(), [x, *model.parameters()])

    both(Model(), gamma, ask)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_values_that_do_not_come_to_their_blocks_value_and_one_that_is_it(gamma: float):
    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        assert len(given) == 8
        losses = (LOSSES["the output"], LOSSES["the output and all of them"])
        return [
            found
            for loss in losses
            for found in grads(loss(out, given), [*given, x, *model.parameters()], retain_graph=True)
        ]

    both(Model(Apart), gamma, ask)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_two_backwards_through_one_graph(gamma: float):
    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        model.zero_grad()
        given[3].retain_grad()
        for loss in ("the output", "the output and all of them"):
            LOSSES[loss](out, given).backward(retain_graph=True)
        found = [given[3].grad.clone(), *(p.grad.clone() for p in model.parameters())]
        return [*found, *grads(LOSSES["the output and some"](out, given), given)]

    both(Model(Lends), gamma, ask)


def test_a_backward_with_inputs():
    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        given[2].retain_grad()
        out.square().sum().backward(inputs=[given[2], x])
        assert model.head.weight.grad is None
        return [given[2].grad, x.grad]

    both(Model(), 0.9, ask)


def test_a_velocity_and_branches_that_are_scaled():
    class Scaled(Gives):
        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            value, given = self.branch(x)
            return x - 0.5 * value, given

    def ask(model: Model, x: Tensor, out: Tensor, given: list[Tensor]) -> list[Any]:
        return grads(out.square().sum() + given[4].sum(), [*given, x])

    both(Model(Scaled), 0.9, ask)


def test_the_first_blocks_frozen():
    model = Model()
    model.stem.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    mm, hand = mfx.momentumize(model, 0.9), ByHand(model, 0.9)
    found = []
    for each in (mm, hand):
        for buffer in model.buffers():
            buffer.zero_()
        torch.manual_seed(1)
        out, given = each(torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4))
        assert [value.requires_grad for value in given] == [False] * 2 + [True] * 6
        found.append(grads(out.square().sum(), given[2:]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_half_precision_under_autocast():
    model = Model().float()
    for block in model.blocks:
        block.drop.p = 0.0
    x, found = torch.randn(5, 4), []
    for reversible in (True, False):
        mm = mfx.momentumize(model, 0.9, reversible=reversible)
        with torch.autocast("cpu", torch.bfloat16):
            out, given = mm(x)
        got = grads(out.float().square().sum() + given[3].float().sum(), given)
        assert [g.dtype for g in got] == [value.dtype for value in given]
        found.append([g.float() for g in got])
    assert relative_error(*found) < 2e-2


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_step_in_which_nobody_asks_costs_one_forward_of_the_branches_more():
    model = Model()
    x = torch.randn(5, 4, dtype=torch.float64)
    mm, kept = mfx.momentumize(model, 0.9), []

    def step(each: nn.Module) -> None:
        out, given = each(x)
        kept.append(given)
        (out.square().sum() + given[3].sum()).backward()

    with torch.no_grad():
        branches = flops(lambda: model(x)) - flops(lambda: model.head(model.stem(x)))
    assert flops(lambda: step(mm)) == flops(lambda: step(model)) + branches


def test_nothing_is_left_after_a_backward_and_a_graph_that_is_dropped_goes_at_once():
    model = Model()
    mm = mfx.momentumize(model, 0.9)
    gc.disable()
    try:
        for ask in ("nobody", "grad", "dropped"):
            _, out, given = run(mm, model)
            node = weakref.ref(given[1].grad_fn)
            if ask != "dropped":
                given[1].retain_grad() if ask == "grad" else None
                out.square().sum().backward()
            del out, given, _
            assert node() is None, ask
    finally:
        gc.enable()


def test_double_backward_is_refused():
    model = Model()
    _, out, given = run(mfx.momentumize(model, 0.9), model)
    with pytest.raises(mfx.BackwardError, match="create_graph=True"):
        torch.autograd.grad(out.square().sum(), given[-1], create_graph=True)


def test_an_output_changed_in_place_is_noticed():
    model = Model()
    model.head = nn.Identity()
    _, out, given = run(mfx.momentumize(model, 0.9), model)
    loss = out.square().sum()
    with torch.no_grad():
        out.add_(1)
    with pytest.raises(RuntimeError, match=r"in.?place"):
        torch.autograd.grad(loss, given[3])
