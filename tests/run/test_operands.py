"""M7, M15: the parameters of a branch are those its modules hold at each call, and none loses its gradient unseen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, relative_error, run
from nets import Net, rows
from recurrence import NetByHand
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import mfx


class Square(nn.Module):
    """x + drop(tanh(one(x))) + two(x), with equal sizes, so that everything can be tied to everything."""

    def __init__(self, width: int, p: float = 0.2) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.drop(torch.tanh(self.one(x))))


def assert_right(mm: nn.Module, model: Net, gamma: float, tolerance: float = 1e-10) -> None:
    x = rows()
    assert_same(run(mm, x), run(NetByHand(model, gamma), x), tolerance)


def tie_weights(model: Net) -> None:
    for block in model.blocks:
        block.two.weight = block.one.weight


def tie_with_the_next_block(model: Net) -> None:
    model.blocks[1].one.weight = model.blocks[0].two.weight
    model.blocks[1].one.bias = model.blocks[1].two.bias


def tie_to_a_new_parameter(model: Net) -> None:
    new = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    for block in model.blocks:
        block.one.weight = block.two.weight = new


def untie(model: Net) -> None:
    for block in model.blocks:
        block.two.weight = nn.Parameter(block.two.weight.detach().clone() + 0.1)


TIED = [tie_weights, tie_with_the_next_block, tie_to_a_new_parameter]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("tie", TIED)
def test_weights_tied_after_the_first_call_count_once_each(tie: Callable[[Net], None], whole: Any, gamma: float):
    model = Net(block=Square)
    mm = mfx.momentumize(model, gamma, modules=whole)
    assert_right(mm, model, gamma)
    tie(model)
    assert_right(mm, model, gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("whole", [None, "blocks.?"])
def test_weights_untied_after_the_first_call_get_a_gradient_each(whole: Any, gamma: float):
    model = Net(block=Square)
    tie_weights(model)
    mm = mfx.momentumize(model, gamma, modules=whole)
    assert_right(mm, model, gamma)
    untie(model)
    assert_right(mm, model, gamma)


def test_tied_weights_that_are_loaded_apart():
    """load_state_dict(assign=True) gives each name a tensor of its own."""
    model = Net(block=Square)
    tie_weights(model)
    mm = mfx.momentumize(model, 0.8)
    mm(rows())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["blocks.1.two.weight"] += 1
    for each in (model, mm):
        each.load_state_dict(state, assign=True)
    assert model.blocks[1].one.weight is not model.blocks[1].two.weight
    assert_right(mm, model, 0.8)


def test_a_momentum_net_whose_functions_are_tied_after_a_call():
    functions = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double() for _ in range(3)]
    nets = [mfx.MomentumNet(functions, 0.8, use_backprop=flag) for flag in (True, False)]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for net in nets:
        net(x)
    for function in functions:
        function[2].weight = functions[0][0].weight
    assert_same(run(nets[1], x), run(nets[0], x))


class Scaled(nn.Linear):
    """Draws on a parameter that may be there or not."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.gain if hasattr(self, "gain") else y


def test_a_parameter_that_a_module_is_given_after_the_first_call_gets_its_gradient():
    model = Net(block=Square, p=0.0)
    for block in model.blocks:
        block.two.__class__ = Scaled
    mm = mfx.momentumize(model, 0.8, modules="blocks.?")
    assert_right(mm, model, 0.8)
    for block in model.blocks:
        block.two.gain = nn.Parameter(torch.full((6,), 1.5, dtype=torch.float64))
    assert_right(mm, model, 0.8)
    assert run(mm, rows()).grads["blocks.0.two.gain"] is not None


@pytest.mark.parametrize("change", ["spectral norm", "pruning"])
def test_weights_that_become_computed_ones_after_the_first_call(change: str):
    model = Net(block=Square, p=0.0)
    mm = mfx.momentumize(model, 0.8, modules="blocks.?")
    assert_right(mm, model, 0.8)
    for block in model.blocks:
        if change == "pruning":
            prune.random_unstructured(block.one, "weight", amount=0.3)
        else:
            parametrizations.orthogonal(block.one)
    assert_right(mm, model, 0.8)


class Lent(nn.Module):
    """A linear layer whose weight is another tensor while it runs, as sharding has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.inner.register_forward_pre_hook(self._lend)
        self.inner.register_forward_hook(self._take_back)

    def _lend(self, module: nn.Module, args: Any) -> None:
        self.held = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(self.held.detach() * 1.0)

    def _take_back(self, module: nn.Module, args: Any, out: Any) -> None:
        module._parameters["weight"] = self.held

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Closed(nn.Module):
    """Computes with a tensor that no module holds as a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.hidden = [torch.ones(width, dtype=torch.float64, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) * self.hidden[0]


@pytest.mark.parametrize("block", [Lent, Closed])
def test_at_gamma_0_what_modules_do_not_hold_has_the_gradient_that_the_model_gives_it(block: type[nn.Module]):
    model = Net(block=block)
    mm, x, hidden = mfx.momentumize(model, 0.0, modules="blocks.?"), rows(), []
    if block is Closed:
        hidden = [each.hidden[0] for each in model.blocks]
    found = []
    for each in (mm, model):
        loss = each(x).square().sum()
        found.append(torch.autograd.grad(loss, [x, *hidden, *model.parameters()], allow_unused=True))
    assert [one is None for one in found[0]] == [one is None for one in found[1]]
    assert relative_error(*found) == 0


@pytest.mark.parametrize("block", [Lent, Closed])
def test_a_gradient_that_would_be_lost_is_refused(block: type[nn.Module]):
    mm = mfx.momentumize(Net(block=block), 0.8, modules="blocks.?")
    loss = mm(rows()).sum()
    with pytest.raises(mfx.BackwardError, match=r"'blocks\.2'.*do not hold as parameters.*exclude='blocks\.2'") as said:
        loss.backward()
    assert ("'Linear.weight' would get none" in str(said.value)) == (block is Lent)


@pytest.mark.parametrize(("whole", "each"), [(None, False), ("blocks.?", False), ("blocks.?", True)])
def test_at_gamma_0_a_sharded_model_has_the_gradients_of_the_model(whole: Any, each: bool, tmp_path: Path):
    """fully_shard exchanges parameters of a module while it runs, in both runs; blocks have to be whole for that."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Net(block=Square, p=0.0).float()
        mm, x = mfx.momentumize(copy.deepcopy(model), 0.0, modules=whole), rows().float().detach()
        for block in mm.blocks if each else ():
            fully_shard(block)
        fully_shard(mm)
        for network in (model, mm):
            network(x).square().sum().backward()
        ours = [parameter.grad.full_tensor() for parameter in mm.parameters()]  # type: ignore[union-attr]
        assert relative_error(ours, [parameter.grad for parameter in model.parameters()]) < 1e-5
    finally:
        torch.distributed.destroy_process_group()


def test_a_swap_that_begins_after_many_right_steps_is_refused_too():
    model = Net(block=Square, p=0.0)
    mm = mfx.momentumize(model, 0.8, modules="blocks.?")
    assert_right(mm, model, 0.8)
    layer, held = model.blocks[1].one, []

    def lend(module: nn.Module, args: Any) -> None:
        held.append(module._parameters["weight"])
        module._parameters["weight"] = nn.Parameter(held[-1].detach() * 1.0)

    layer.register_forward_pre_hook(lend)
    layer.register_forward_hook(lambda module, *_: module._parameters.update(weight=held[-1]))
    with pytest.raises(mfx.BackwardError, match=r"block 'blocks\.1'.*'Linear\.weight' would get none"):
        mm(rows()).sum().backward()


class Idle(Square):
    """Has a parameter that it does not use."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.idle = nn.Linear(width, width)


def test_a_parameter_that_is_not_used_has_no_gradient_and_nothing_is_said():
    model = Net(block=Idle)
    mm = mfx.momentumize(model, 0.8, modules="blocks.?")
    assert_right(mm, model, 0.8)
    assert run(mm, rows()).grads["blocks.1.idle.weight"] is None


def test_parameters_that_are_computed_outside_are_differentiated_through():
    """torch.func.functional_call with values that have a history of their own."""
    model, x = Net(block=Square, p=0.0), rows()
    mm, factor = mfx.momentumize(model, 0.8), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    found = []
    for each in (mm, NetByHand(model, 0.8)):
        given = {name: value.detach() * factor for name, value in each.named_parameters()}
        out = torch.func.functional_call(each, given, (x,))
        found.append(torch.autograd.grad(out.square().sum(), [x, factor]))
    assert relative_error(*found) < 1e-10
