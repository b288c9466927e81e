"""torch.compile of momentumized models: one graph, the same function and gradients as outside of a compiler."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from compiled import chains, driven, gradients, handed, recording
from helpers import buffers_kept, relative_error
from nets import Block, ConvBlock, ConvNet, Net, images, rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfx
from mfx import kept_bytes
from mfx.rule import Momentum, schedule

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", [recording, "aot_eager"])
@pytest.mark.parametrize(
    ("make", "inputs", "options"),
    [
        (Net, rows, {}),
        (ConvNet, images, {}),
        (Net, rows, {"velocity": "first"}),
        (Net, rows, {"velocity": lambda chain: nn.Linear(6, 6).double()}),
    ],
)
def test_compiled_is_what_it_is_uncompiled(make, inputs, options, backend, dynamic):
    mm, x = mfx.momentumize(make(2, p=0.0), 0.8, **options), inputs()
    net = torch.compile(mm, backend=backend, fullgraph=True, dynamic=dynamic)
    assert relative_error(gradients(net, mm, x), gradients(mm, mm, x)) < 1e-10
    assert [chains(gm) for gm in driven] == [["momentum_0"]]


def test_train_and_eval_and_a_new_head():
    mm, x = mfx.momentumize(ConvNet(2, p=0.0), 0.8), images()
    net = torch.compile(mm, backend="aot_eager", fullgraph=True)
    net(x)
    mm.eval()
    assert relative_error(net(x), mm(x)) < 1e-12
    mm.head = nn.Linear(6, 7).double()
    assert net(x).shape == (4, 7)
    assert relative_error(net(x), mm(x)) < 1e-12


def test_a_change_of_gamma_is_seen():
    mm, x = mfx.momentumize(Net(2, p=0.0), 0.9), rows()
    net = torch.compile(mm, backend=recording, fullgraph=True)
    for gamma in (0.9, 0.0, 0.5):
        mfx.set_gamma(mm, gamma)
        assert relative_error(gradients(net, mm, x), gradients(mm, mm, x)) < 1e-12


WHERE_CHAINS_STORE = {
    "checkpoint": lambda mm: lambda x: checkpoint(mm, x * 1, use_reentrant=False),
    "vmap": lambda mm: lambda x: torch.vmap(lambda x: mm(x))(x),
    "grad": lambda mm: lambda x: torch.func.grad(lambda x: mm(x).square().sum())(x),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", WHERE_CHAINS_STORE)
def test_a_change_of_gamma_is_seen_where_a_compiler_follows_chains_into_their_arithmetic(where, backend):
    mm, x = mfx.momentumize(Net(3, p=0.0), 0.9), rows().detach()
    call = WHERE_CHAINS_STORE[where](mm)
    net = torch.compile(call, backend=backend, fullgraph=True)
    for gamma in (0.9, 0.0, 0.5, 0.9):
        mfx.set_gamma(mm, gamma)
        assert relative_error(net(x), call(x)) < 1e-12


def test_annealing_compiles_nothing_anew():
    mm, x = mfx.momentumize(Net(3), 0.0), rows()
    net = torch.compile(mm, backend=recording, fullgraph=True)
    schedule = mfx.GammaSchedule(mm, 0.0, 0.9, steps=100)
    counts = []
    for _ in range(100):
        net(x).sum().backward()
        counts.append(len(handed))
        schedule.step()
    assert counts[1] == counts[-1], "the first two compile, for gamma = 0 and above"
    assert len(driven) == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_drift_is_measured_and_none(backend):
    mm, x = mfx.momentumize(Net(24, p=0.2).float(), 0.9), rows().float()
    torch.compile(mm, backend=backend, fullgraph=True)(x).sum().backward()
    assert mfx.drift(mm) == {"momentum_0": 0.0}


def test_models_of_one_class_do_not_share_compiled_code():
    model, x = Net(2, p=0.0), rows()
    for gamma in (0.9, 0.2):
        mm = mfx.momentumize(model, gamma)
        assert relative_error(torch.compile(mm, backend=recording, fullgraph=True)(x), mm(x)) < 1e-12
    for twin in (copy.deepcopy(mm), pickle.loads(pickle.dumps(mm))):
        assert relative_error(torch.compile(twin, backend=recording, fullgraph=True)(x), mm(x)) < 1e-12


def test_two_models_in_one_outer_graph():
    velocity = {"velocity": lambda chain: nn.Linear(6, 6).double()}
    first, second = (mfx.momentumize(Net(2, p=0.0), gamma, **velocity) for gamma in (0.9, 0.3))
    both = nn.ModuleList([first, second])

    def outer(x):
        return first(x * 2) + second(x).sin()

    x = rows()
    net = torch.compile(outer, backend=recording, fullgraph=True)
    assert relative_error(gradients(net, both, x), gradients(outer, both, x)) < 1e-10
    assert len(chains(driven[0])) == 2


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_autograd_follows_the_backward(compiled):
    mm, x = mfx.momentumize(Net(3, p=0.0), 0.8), rows()
    _, expected = gradients(mm, mm, x)
    net = torch.compile(mm, backend="aot_eager", fullgraph=True) if compiled else mm
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        net(x).square().sum().backward()
    assert relative_error([x.grad, *(parameter.grad for parameter in mm.parameters())], list(expected)) < 1e-10


def test_a_transform_of_functions_around_the_model():
    mm, x = mfx.momentumize(Net(3, p=0.0), 0.8), rows()
    grad = torch.compile(torch.func.grad(lambda x: mm(x).square().sum()), backend="aot_eager", fullgraph=True)
    assert relative_error(grad(x.detach()), gradients(mm, mm, x)[1][0]) < 1e-10


class Staged(ConvNet):
    """Two stages with batch norm, whose chains have modules of their own."""

    def __init__(self) -> None:
        super().__init__(2, p=0.0)
        self.down = nn.Conv2d(6, 6, 3, stride=2, padding=1).double()
        self.more = nn.Sequential(ConvBlock(p=0.0), ConvBlock(p=0.0)).double()

    def forward(self, x):
        return self.head(self.more(self.down(self.blocks(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize("backend", [recording, "aot_eager"])
def test_every_stage_knows_its_buffers(backend):
    model, x = Staged(), images()
    reference = mfx.momentumize(copy.deepcopy(model), 0.8, reversible=False)
    mm = mfx.momentumize(model, 0.8, example_inputs=x)
    net = torch.compile(mm, backend=backend, fullgraph=True)
    assert relative_error(gradients(net, mm, x), gradients(reference, reference, x)) < 1e-10
    assert relative_error(dict(mm.named_buffers()), dict(reference.named_buffers())) < 1e-12
    assert [chains(gm) for gm in driven] == [["momentum_0", "momentum_1"]]


def test_bytes_kept_do_not_grow_with_depth():
    def kept(depth: int) -> int:
        torch._dynamo.reset()
        mm, x = mfx.momentumize(Net(depth), 0.9), rows(40)
        net = torch.compile(mm, backend="aot_eager", fullgraph=True)
        return kept_bytes(mm, [x], lambda: net(x))[0]

    assert kept(8) <= kept(4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_bytes_kept_are_those_of_the_plan(gamma, backend):
    depth, width = 24, 16
    model = nn.Sequential(*(Block(width, 0.1) for _ in range(depth)))
    x = torch.randn(64, width)
    net = torch.compile(model, backend=mfx.backend(gamma, backend), fullgraph=True)
    planned = schedule((Momentum(gamma),) * depth, torch.float32)
    kept, _ = kept_bytes(model, [x], lambda: net(x))
    state = x.numel() * x.element_size()
    numbers = 64
    assert kept <= planned.bytes_an_element(depth) * x.numel() + state + numbers
    assert kept >= (planned.state_count(depth) - 1) * state


def test_dynamo_captured_models_compile():
    x = rows()
    mm = mfx.momentumize(Net(2, p=0.0), 0.8, capture="dynamo", example_inputs=x)
    net = torch.compile(mm, backend=recording, fullgraph=True)
    assert relative_error(gradients(net, mm, x), gradients(mm, mm, x)) < 1e-10


class Broken(Net):
    """A graph break between two blocks, while a compiler looks on."""

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break()
        return self.head(self.blocks[1](x))


def test_a_break_inside_is_an_error():
    mm = mfx.momentumize(Broken(2, p=0.0), 0.9)
    with pytest.raises(Exception, match="breaks the graph inside") as caught:
        torch.compile(mm, backend="eager")(rows())
    assert "momentumized" in str(caught.value)
    assert torch.backends.mha.get_fastpath_enabled(), "what is off inside is on again"


def test_breaks_around_the_model_do_no_harm():
    mm, x = mfx.momentumize(Net(2, p=0.0), 0.9), rows()

    def step(x):
        x = x * 2
        torch._dynamo.graph_break()
        y = mm(x)
        torch._dynamo.graph_break()
        return y + 1

    net = torch.compile(step, backend=recording)
    assert relative_error(gradients(net, mm, x), gradients(step, mm, x)) < 1e-10
    assert sum(len(chains(gm)) for gm in driven) == 1


CHECKPOINTED = {
    "one model": lambda one, two, x: checkpoint(one, x * 1, use_reentrant=False),
    "two models": lambda one, two, x: checkpoint(lambda x: two(one(x).tanh()), x * 1, use_reentrant=False),
    "one outside": lambda one, two, x: two(checkpoint(one, x * 1, use_reentrant=False).tanh()),
    "one in a checkpoint in one": lambda one, two, x: checkpoint(
        lambda x: checkpoint(one, x * 2, use_reentrant=False).tanh(), x * 1, use_reentrant=False
    ),
}


@pytest.mark.parametrize(
    ("where", "backend"),
    [
        *((where, "aot_eager") for where in CHECKPOINTED),
        pytest.param("one outside", "inductor", marks=pytest.mark.slow),
    ],
)
def test_inside_a_compiled_checkpoint_a_model_is_what_it_is_outside(where, backend):  # M5, M6
    p = 0.2 if backend == "aot_eager" else 0.0  # inductor draws its own random numbers
    one = mfx.momentumize(ConvNet(3, p=p), 0.9)
    two = mfx.momentumize(nn.Sequential(nn.Linear(2, 4).double(), Net(2, p=p)), 0.7)
    both, x, found = nn.ModuleList([one, two]), images(), []

    def plainly(x):
        y = one(x * 2).tanh() if where.startswith("one in") else one(x)
        return two(y.tanh()) if where in ("two models", "one outside") else y

    compiled = torch.compile(lambda x: CHECKPOINTED[where](one, two, x), backend=backend, fullgraph=True)
    for step in (compiled, plainly):
        torch.manual_seed(0)
        with buffers_kept(both):
            found.append([*gradients(step, both, x), *(buffer.clone() for buffer in both.buffers())])
    assert relative_error(*found) < 1e-10


def test_learned_velocities_have_their_gradient_inside_of_a_compiled_checkpoint():
    mm, x = mfx.momentumize(Net(3, p=0.0), 0.9, velocity=lambda chain: nn.Linear(6, 6).double()), rows()
    net = torch.compile(lambda x: checkpoint(mm, x * 1, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert relative_error(gradients(net, mm, x), gradients(mm, mm, x)) < 1e-10


@pytest.mark.parametrize("gamma", [mfx.LearnedGamma(0.8), mfx.RandomSign(0.8)], ids=lambda one: type(one).__name__)
def test_gammas_that_modules_give_are_refused_inside_of_a_compiled_checkpoint(gamma):  # M15
    mm = mfx.momentumize(Net(3, p=0.0), gamma)
    net = torch.compile(lambda x: checkpoint(mm, x * 1, use_reentrant=False), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"gammas that modules give.*outside of that"):
        net(rows())


def test_inside_of_a_condition_a_model_is_what_it_is_outside():
    mm = mfx.momentumize(Net(3, p=0.0), 0.9)

    def either(x):
        return torch.cond(x.sum() > 0, lambda x: mm(x).sin(), lambda x: mm(x).cos(), (x,))

    for x in (rows().abs(), -rows().abs()):
        x = x.detach().requires_grad_()
        net = torch.compile(either, backend="aot_eager", fullgraph=True)
        assert relative_error(gradients(net, mm, x), gradients(either, mm, x)) < 1e-10


class SeesCompiler(Net):
    """One block fewer while a compiler looks on."""

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        if not torch.compiler.is_dynamo_compiling():
            x = self.blocks[1](x)
        return self.head(x)


def test_other_chains_under_the_compiler_are_an_error():
    mm = mfx.momentumize(SeesCompiler(2, p=0.0), 0.9)
    with pytest.raises(Exception, match=r"has the chains .*and else"):
        torch.compile(mm, backend="eager", fullgraph=True)(rows())


@pytest.mark.slow
def test_inductor():
    mm, x = mfx.momentumize(Net(2, p=0.0), 0.8), rows(3)
    net = torch.compile(mm, fullgraph=True)
    assert relative_error(gradients(net, mm, x), gradients(mm, mm, x)) < 1e-10
