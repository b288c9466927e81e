"""What lies between compiled chains, and what their branches hold: all that Dynamo hands over can be compiled again."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from compiled import computing, gradients, handed, recording
from helpers import relative_error
from nets import ConvNet, Net, images, rows
from torch import Tensor, nn

import mfx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Cube(torch.autograd.Function):
    """x^3, whose backward is twice what it should be, so that one sees whether it was used."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 6 * x**2 * grad


def cube(x: Tensor) -> Tensor:
    return Cube.apply(x)  # type: ignore[return-value]


class Around(Net):
    """Net with something before its blocks, and after."""

    def __init__(self, what) -> None:
        super().__init__(3, p=0.0)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.what(self.blocks(self.what(self.stem(x)))))


class Inside(nn.Module):
    """x + g(f(x))."""

    def __init__(self, width: int, what) -> None:
        super().__init__()
        self.f, self.what = nn.Linear(width, width), what

    def forward(self, x: Tensor) -> Tensor:
        return x + self.what(self.f(x))


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax()
    return x / scale


def in_bfloat16(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x.float() @ torch.eye(x.shape[-1])).to(x.dtype)


def sized(x: Tensor) -> Tensor:
    return x.view(x.shape[0] * x.shape[1]).view(x.shape[0], -1) * x.shape[0]


WHAT = {
    "custom": cube,
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False),
    "no_grad": without_grad,
    "autocast": in_bfloat16,
    "sizes": sized,
    "in place": lambda x: (x * 2).add_(1).relu_(),
}


class Scaled(Net):
    """x + f(x) s, for a number s that is an argument."""

    def forward(self, x: Tensor, s: float) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block.down(block.up(x).tanh()) * s
        return self.head(x) * s


@pytest.mark.parametrize("backend", [recording, "aot_eager"])
def test_a_number_may_change_at_each_call(backend):
    """Twelve values, and Dynamo compiles a function eight times."""
    model, x = Scaled(3, p=0.0), rows()
    net = torch.compile(mfx.momentumize(model, 0.8), backend=backend, fullgraph=True)
    for number in range(12):
        s, v, y = 0.3 + 0.1 * number, 0.0, model.stem(x)
        for block in model.blocks:
            v = 0.8 * v + 0.2 * block.down(block.up(y).tanh()) * s
            y = y + v
        expected = torch.autograd.grad((model.head(y) * s).square().sum(), [x, *model.parameters()], allow_unused=True)
        found = gradients(net, model, x, s)[1]
        pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
        assert relative_error(*map(list, zip(*pairs, strict=True))) < 1e-10
    assert computing("tanh") <= 3


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("place", ["around", "inside"])
@pytest.mark.parametrize("what", WHAT)
def test_whatever_dynamo_hands_over_is_compiled(what, place, inner, dynamic):
    make = {"around": lambda: Around(WHAT[what]), "inside": lambda: Net(3, block=partial(Inside, what=WHAT[what]))}
    model = make[place]()
    reference, x = copy.deepcopy(model), rows()
    net = torch.compile(model, backend=mfx.backend(0.9, inner), fullgraph=True, dynamic=dynamic)
    stored = torch.compile(reference, backend=mfx.backend(0.9, "eager", reversible=False), fullgraph=True)
    assert relative_error(gradients(net, model, x), gradients(stored, reference, x)) < 1e-9


def test_a_custom_backward_is_the_one_that_runs():
    model = Net(3, block=partial(Inside, what=cube))
    reference, x = copy.deepcopy(model), rows()
    net = torch.compile(model, backend=mfx.backend(0.0, "aot_eager"), fullgraph=True)
    assert relative_error(gradients(net, model, x), gradients(reference, reference, x)) < 1e-10


def test_another_batch_compiles_no_branch_anew_where_sizes_are_dynamic():
    mm = mfx.momentumize(Net(3, p=0.0), 0.9)
    net = torch.compile(mm, backend=recording, fullgraph=True, dynamic=True)
    for count in (5, 7, 9):
        x = rows(count)
        assert relative_error(gradients(net, mm, x), gradients(mm, mm, x)) < 1e-10
    assert computing("gelu") == 1


def test_models_of_one_structure_share_their_branch():
    models = nn.ModuleList(mfx.momentumize(Net(2, p=0.0), gamma) for gamma in (0.9, 0.3))

    def both(x):
        return models[0](x) + models[1](x)

    x = rows()
    net = torch.compile(both, backend=recording, fullgraph=True)
    assert relative_error(gradients(net, models, x), gradients(both, models, x)) < 1e-10
    assert computing("gelu") == 1


@pytest.mark.parametrize("door", ["backend", "inside"])
def test_each_size_of_a_branch_is_a_function_of_its_own(door):
    """One text, and more sizes than Dynamo compiles a function for."""
    stages = [ConvNet(2, width, p=0.0) for width in range(4, 16)]
    model = nn.ModuleList(stages)
    inside = [mfx.momentumize(stage, 0.9) if door == "inside" else stage for stage in stages]

    def total(x):
        return sum(stage(x) for stage in inside)

    x = images()
    backend = recording if door == "inside" else mfx.backend(0.9, recording)
    references = nn.ModuleList(mfx.momentumize(copy.deepcopy(stage), 0.9, reversible=False) for stage in stages)
    expected = gradients(lambda x: sum(stage(x) for stage in references), references, x)
    net = torch.compile(total, backend=backend, fullgraph=True)
    assert relative_error(gradients(net, model, x), expected) < 1e-9
    assert computing("relu") == len(stages)
    assert not any(isinstance(size, torch.SymInt) for gm in handed for size in sizes_in(gm)), "none is for all sizes"


def sizes_in(gm):
    values = (node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder"))
    return [size for value in values if isinstance(value, Tensor) and value.dim() == 4 for size in value.shape]


def test_a_custom_function_is_compiled_for_each_kind_of_inputs():
    model = Net(3, block=partial(Inside, what=cube))
    mm = mfx.momentumize(model, 0.5)
    net = torch.compile(mm, backend="aot_eager", fullgraph=True)
    for count, dtype in ((5, torch.float64), (7, torch.float64), (7, torch.float32), (5, torch.float64)):
        mm.to(dtype)
        x = rows(count).detach().to(dtype).requires_grad_()
        expected = gradients(mm, mm, x)
        assert relative_error(gradients(net, mm, x), expected) < (1e-10 if dtype == torch.float64 else 1e-4)


def test_a_first_block_whose_input_needs_no_gradient_is_compiled_once():
    model = Net(1, p=0.0)
    model.stem.requires_grad_(False)
    mm, x = mfx.momentumize(model, 0.9), rows().detach()
    net = torch.compile(mm, backend=recording, fullgraph=True)
    net(x).sum().backward()
    assert computing("gelu") == 1


def test_explain_sees_one_graph():
    found = torch._dynamo.explain(mfx.momentumize(Net(3, p=0.0), 0.9))(rows())
    assert (found.graph_count, found.graph_break_count) == (1, 0)


class Growing(nn.Module):
    """x + f(x), by which x grows about 1.3 times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        nn.init.orthogonal_(self.f.weight, gain=0.9)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.f(x)) * 4


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_stream_that_grows_has_gradients_as_good_as_in_eager_mode(inner):
    model = nn.Sequential(*(Growing(16) for _ in range(24)))
    x = torch.randn(64, 16)
    exact = mfx.momentumize(copy.deepcopy(model).double(), 0.9, reversible=False)
    y, expected = gradients(exact, exact, x.double())
    assert y.abs().max() / x.abs().max() > 600
    eager = mfx.momentumize(copy.deepcopy(model), 0.9)
    found = gradients(torch.compile(model, backend=mfx.backend(0.9, inner), fullgraph=True), model, x)
    off = relative_error([grad.double() for grad in found[1]], list(expected))
    by_eager = relative_error([grad.double() for grad in gradients(eager, eager, x)[1]], list(expected))
    assert off < 2 * by_eager + 1e-6
    assert off < 1e-5


def test_stored_and_reversed_gradients_are_the_same_bits():
    """The compiled branches are the same, masks are, and nothing is rounded on the way back."""

    def of(reversible: bool):
        torch.manual_seed(0)
        model, x = Net(24, 16, p=0.1).float(), torch.randn(64, 4, requires_grad=True)
        mm = mfx.momentumize(model, 0.9, reversible=reversible, state_dtype=torch.float64)
        torch.manual_seed(1)
        return gradients(torch.compile(mm, backend="aot_eager", fullgraph=True), mm, x)

    (y, grads), (stored_y, stored) = of(True), of(False)
    assert torch.equal(y, stored_y)
    off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(grads, stored, strict=True)]
    assert max(off) < 1e-6


def test_nothing_of_a_chain_is_in_what_the_inner_backend_is_given():
    model = Net(6, p=0.0)
    torch.compile(model, backend=mfx.backend(0.9, recording), fullgraph=True)(rows())
    nodes = [len(gm.graph.nodes) for gm in handed]
    assert max(nodes) < 20
