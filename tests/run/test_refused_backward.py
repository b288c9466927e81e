"""M8: where a gradient cannot be right, an error names the cause and the remedy; never a wrong one in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import backward, relative_error
from nets import ConvNet, Net, images, rows
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

import mfx


class Chain(Net):
    """Ends in the chain itself."""

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block.up(x)
            x = x + block.down(y if side is None else y * side)
        return x


def test_an_output_overwritten_in_place() -> None:
    mm = mfx.momentumize(Chain())
    out = mm(rows())
    loss = out.sum()
    out.zero_()
    with pytest.raises(mfx.BackwardError, match=r"momentum_0.*changed in place.*\.clone\(\)"):
        loss.backward()


def test_an_output_overwritten_by_the_rest_of_the_model_is_handed_out_as_a_copy() -> None:
    class Overwriting(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mul_(2).add_(1)

    model, x = Overwriting(), rows()
    found = []
    for flag in (True, False):
        out = mfx.momentumize(model, 0.8, reversible=flag)(x)
        found.append(torch.autograd.grad(out.square().sum(), [x, *model.blocks.parameters()], allow_unused=True))
    assert relative_error(*found) < 1e-10


def add_to_weight(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].up.weight.add_(1.0)


def assign_data(model: Any) -> None:
    model.blocks[1].up.weight.data = torch.zeros_like(model.blocks[1].up.weight)


def load_state(model: Any) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def step_the_optimizer(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", [add_to_weight, assign_data, load_state, step_the_optimizer])
def test_a_parameter_changed_between_forward_and_backward(change: Callable[[Any], None]) -> None:
    mm = mfx.momentumize(Chain())
    loss = mm(rows()).sum()
    change(mm)
    with pytest.raises(mfx.BackwardError, match=r"block 'blocks\.\d|block '#\d") as caught:
        loss.backward()
    assert "parameter" in str(caught.value)


def test_a_replaced_parameter_does_not_matter() -> None:
    mm, x = mfx.momentumize(Chain()), rows()
    expected = torch.autograd.grad(mm(x).square().sum(), x)
    loss = mm(x).square().sum()
    mm.blocks[1].up.weight = nn.Parameter(torch.zeros_like(mm.blocks[1].up.weight))
    assert relative_error(torch.autograd.grad(loss, x), expected) < 1e-12


def test_a_buffer_changed_between_forward_and_backward() -> None:
    mm = mfx.momentumize(ConvNet().eval())
    loss = mm(images()).sum()
    mm.blocks[1].bn.running_mean.add_(1.0)
    with pytest.raises(mfx.BackwardError, match=r"block 'blocks\.1': buffer 'running_mean' of BatchNorm2d was changed"):
        loss.backward()


def test_running_statistics_may_move_on_between_forward_and_backward_in_training() -> None:
    model, x = ConvNet(p=0.0), images()
    mm = mfx.momentumize(model)
    expected = torch.autograd.grad(mm(x).sum(), x)
    loss = mm(x).sum()
    mm(x * 2)
    assert relative_error(torch.autograd.grad(loss, x), expected) < 1e-12


def test_a_side_input_changed_between_forward_and_backward() -> None:
    mm = mfx.momentumize(Chain())
    side = torch.ones(5, 12, dtype=torch.float64)
    loss = mm(rows(), side).sum()
    side.add_(1.0)
    with pytest.raises(mfx.BackwardError, match=r"side input of block .* changed in place"):
        loss.backward()


def test_what_is_outside_the_chain_follows_autograds_own_rules() -> None:
    mm = mfx.momentumize(Net(p=0.0))
    x = rows().detach()
    expected = torch.autograd.grad(mm(x).sum(), list(mm.parameters()))
    loss = mm(x).sum()
    with torch.no_grad():
        mm.stem.weight.add_(1.0)
    assert relative_error(torch.autograd.grad(loss, list(mm.parameters())), expected) == 0


SUBSETS = {
    "the input": lambda model, x: [x],
    "a block's weight": lambda model, x: [model.blocks[1].up.weight],
    "everything": lambda model, x: [x, *model.parameters()],
    "the stem's weight": lambda model, x: [model.stem.weight],
}


@pytest.mark.parametrize("subset", SUBSETS)
def test_double_backward_is_refused(subset: str) -> None:
    mm, x = mfx.momentumize(Net(p=0.0), 0.8), rows()
    with pytest.raises(mfx.BackwardError, match=r"create_graph=True.*reversible=False"):
        torch.autograd.grad(mm(x).square().sum(), SUBSETS[subset](mm, x), create_graph=True)


@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_double_backward_at_gamma_0_is_that_of_the_model(subset: str, whole: Any) -> None:
    model, x = Net(), rows()
    second = []
    for each in (model, mfx.momentumize(model, 0.0, modules=whole)):
        torch.manual_seed(1)
        firsts = torch.autograd.grad(each(x).square().sum(), SUBSETS[subset](model, x), create_graph=True)
        total = sum(first.square().sum() for first in firsts)
        second.append(torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True))
    assert relative_error(*second) == 0


def test_double_backward_that_passes_the_chain_by_is_right() -> None:
    """The first derivative by the head's weight needs no backward through the chain; the second is a first one."""
    model, x = Net(p=0.0), rows()
    second = []
    for flag in (True, False):
        mm = mfx.momentumize(model, reversible=flag)
        (first,) = torch.autograd.grad(mm(x).square().sum(), mm.head.weight, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [x, *mm.parameters()], allow_unused=True))
    assert relative_error(*second) < 1e-10


def test_double_backward_of_the_stored_run_works() -> None:
    mm, x = mfx.momentumize(Net(p=0.0), reversible=False), rows()
    (first,) = torch.autograd.grad(mm(x).square().sum(), x, create_graph=True)
    backward(first.square().sum())
    assert mm.blocks[0].up.weight.grad is not None


def test_a_backward_that_starts_inside_the_chain_is_not_possible_from_outside() -> None:
    """Every value of the chain leaves through its closing node, so any backward starts there."""
    mm, x = mfx.momentumize(Chain()), rows()
    out = mm(x)
    assert "Close" in type(out.grad_fn).__name__


def plain_and_reversible(p: float = 0.0) -> tuple[nn.Module, nn.Module]:
    model = Net(p=p)
    return mfx.momentumize(model, 0.8, reversible=False), mfx.momentumize(model, 0.8)


def test_functional_call_gives_the_gradients_of_the_given_parameters() -> None:
    stored, reversible = plain_and_reversible()
    given = {name: (value + 0.1).detach().requires_grad_() for name, value in stored.named_parameters()}
    x = rows()
    found = [
        torch.autograd.grad(functional_call(each, given, (x,)).square().sum(), [x, *given.values()])
        for each in (reversible, stored)
    ]
    assert relative_error(*found) < 1e-10
    assert all(parameter.grad is None for parameter in reversible.parameters())


def test_torch_func_transforms_run_with_stored_activations_and_are_right() -> None:
    stored, reversible = plain_and_reversible()
    x = rows().detach()
    tangent = torch.randn_like(x)
    parameters = dict(stored.named_parameters())

    def loss(each: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(each, parameters, (x,)).square().sum()

    results = []
    for each in (reversible, stored):
        results.append(
            [
                grad(lambda p, each=each: loss(each, p, x))(parameters),
                vmap(grad(lambda p, x, each=each: loss(each, p, x[None])), (None, 0))(parameters, x),
                vmap(each)(x),
                jvp(each, (x,), (tangent,)),
                vjp(each, x)[1](torch.ones(5, 2, dtype=torch.float64)),
            ]
        )
    assert relative_error(*results) < 1e-10
