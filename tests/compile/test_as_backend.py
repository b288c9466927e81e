"""The pass as a backend of torch.compile: what is rewritten, gradients, kept bytes, refusals."""

from __future__ import annotations

import copy
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compiled import chains, computing, driven, gradients, recording
from helpers import relative_error
from nets import ConvNet, Net, images, rows
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import mfx
from mfx import kept_bytes
from mfx.capture.lifted import prepare
from mfx.compile.as_backend import entry_point

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(("make", "inputs"), [(Net, rows), (ConvNet, images)])
def test_compiled_gradients_are_those_of_the_stored_run(make, inputs, inner, dynamic):
    model, x = make(3, p=0.0), inputs()
    reference = copy.deepcopy(model)
    net = torch.compile(model, backend=mfx.backend(0.7, inner), fullgraph=True, dynamic=dynamic)
    found = gradients(net, model, x)
    expected = gradients(mfx.momentumize(reference, 0.7, reversible=False), reference, x)
    assert relative_error(found, expected) < 1e-10
    # Running statistics move, and move once.
    assert relative_error(dict(model.named_buffers()), dict(reference.named_buffers())) < 1e-12


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_gradients_against_finite_differences(gamma):
    model = Net(3, p=0.0)
    net = torch.compile(model, backend=mfx.backend(gamma, "aot_eager"), fullgraph=True)
    assert torch.autograd.gradcheck(net, (rows(2),), eps=1e-6, atol=1e-7, fast_mode=True)


def test_gamma_zero_is_the_model():
    model = Net(3, p=0.0)
    x = rows()
    net = torch.compile(model, backend=mfx.backend(0.0, "aot_eager"), fullgraph=True)
    assert relative_error(gradients(net, model, x), gradients(model, model, x)) < 1e-12


def test_bytes_kept_do_not_grow_with_depth():
    def kept(depth: int) -> int:
        torch._dynamo.reset()
        model, x = Net(depth), rows(40)
        net = torch.compile(model, backend=mfx.backend(0.9, "aot_eager"), fullgraph=True)
        return kept_bytes(model, [x], lambda: net(x))[0]

    assert kept(8) <= kept(4)


def test_the_graph_handed_on_has_the_chain_in_the_place_of_its_blocks():
    net = torch.compile(Net(3, p=0.0), backend=mfx.backend(0.9, recording), fullgraph=True)
    net(rows())
    assert chains(driven[0]) == ["momentum_0"]
    assert not any(node.target is torch.nn.functional.gelu for node in driven[0].graph.nodes)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_each_distinct_branch_is_compiled_once(depth):
    model = Net(depth, p=0.2)
    net = torch.compile(model, backend=mfx.backend(0.9, recording), fullgraph=True)
    for _ in range(2):
        gradients(net, model, rows())
    assert computing("gelu") == 1
    net(rows())
    model.eval()
    gradients(net, model, rows())
    assert computing("gelu") == 2, "once more without dropout"


def test_options_reach_the_planner_by_block_name():
    net = torch.compile(Net(4, p=0.0), backend=mfx.backend(0.9, recording, exclude="blocks.1"), fullgraph=True)
    net(rows())
    assert chains(driven[0]) == ["momentum_0", "momentum_1"]
    bad = torch.compile(Net(2), backend=mfx.backend(0.9, recording, include="block.*"))
    with pytest.raises(BackendCompilerFailed, match=r"matches no block; near names: 'blocks\.[01]'"):
        bad(rows())


def test_models_in_a_compiled_function_are_named_by_it():
    first, second = Net(2, p=0.0), Net(2, p=0.0)
    names: list[list[str]] = []

    def inner(gm, example_inputs):
        prepare(gm, example_inputs)
        names.append(sorted({node.meta["mfx_scope"].path for node in gm.graph.nodes}))
        return gm.forward

    torch.compile(lambda x: first(x) + second(x), backend=inner, fullgraph=True)(rows())
    assert {"first.blocks.0", "second.blocks.1.norm"} <= set(names[0])


def test_once_installed_it_is_found_by_its_name():
    if not importlib.metadata.entry_points(group="torch_dynamo_backends", name="mfx"):
        pytest.skip("mfx is not installed here")
    model, x = Net(3, p=0.0), rows()
    net = torch.compile(model, backend="mfx", options={"gamma": 0.8, "inner": "eager"}, fullgraph=True)
    assert relative_error(net(x), mfx.momentumize(model, 0.8)(x)) < 1e-12


def test_the_entry_point_names_a_backend():
    if sys.version_info < (3, 11):
        pytest.skip("tomllib")
    import tomllib

    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["mfx"].partition(":")
    assert getattr(importlib.import_module(module), name) is entry_point


def test_compile_by_name_with_options():
    torch._dynamo.register_backend(entry_point, "mfx_by_name")
    model, x = Net(2, p=0.0), rows()
    reference = copy.deepcopy(model)
    options = {"gamma": 0.6, "inner": "aot_eager"}
    found = gradients(torch.compile(model, backend="mfx_by_name", options=options), model, x)
    expected = gradients(mfx.momentumize(reference, 0.6, reversible=False), reference, x)
    assert relative_error(found, expected) < 1e-10


def test_nothing_rewritten_is_said():
    net = torch.compile(nn.Linear(4, 4).double(), backend=mfx.backend(0.9, "eager"))
    with pytest.warns(mfx.NothingRewrittenWarning, match="no residual add"):
        net(rows())


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"velocity": lambda chain: nn.Identity()}, mfx.OptionError, "learned velocity"),
        ({"modules": "blocks.*"}, mfx.OptionError, "modules="),
        ({"inner": 3}, mfx.InputTypeError, "inner must be"),
        ({"gamma": 1.0}, mfx.OptionError, "gamma=1.0"),
    ],
)
def test_options_that_a_backend_cannot_have(given, error, text):
    with pytest.raises(error, match=text):
        mfx.backend(**given)


class Broken(Net):
    """A graph break between two blocks."""

    def forward(self, x):
        x = self.blocks[0](self.stem(x))
        torch._dynamo.graph_break()
        return self.head(self.blocks[1](x))


class InLoop(Net):
    """A break that Dynamo can only leave by running the loop itself."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            print(end="", flush=torch._dynamo.graph_break() is None)
        return self.head(x)


@pytest.mark.parametrize("make", [Broken, InLoop])
def test_a_model_in_parts_is_refused(make):
    net = torch.compile(make(2, p=0.0), backend=mfx.backend(0.9, "eager"))
    with pytest.raises(BackendCompilerFailed, match=r"breaks the graph at .*test_as_backend\.py"):
        net(rows())


def test_parts_can_be_accepted():
    net = torch.compile(Broken(2, p=0.0), backend=mfx.backend(0.9, recording, graph_breaks=True))
    net(rows())
    assert [chains(gm) for gm in driven] == [["momentum_0"], ["momentum_0"]]


class Mixed(nn.Module):
    """Two blocks under autocast, one outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = x + torch.tanh(self.f(x))
            x = x + torch.tanh(self.g(x))
        return x + torch.tanh(self.h(x))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_inside_a_model_covers_what_it_covered(inner):
    model, x = Mixed(), torch.randn(5, 4, requires_grad=True)
    net = torch.compile(model, backend=mfx.backend(0.0, inner), fullgraph=True)
    assert relative_error(gradients(net, model, x), gradients(model, model, x)) < 1e-3


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_around_the_step_holds_in_the_recomputation(inner):
    model, x = Net(3, p=0.0).float(), rows().detach().float().requires_grad_()
    reference = copy.deepcopy(model)
    net = torch.compile(model, backend=mfx.backend(0.9, inner), fullgraph=True)
    stored = mfx.momentumize(reference, 0.9, reversible=False)
    results = []
    for call, owner in ((net, model), (stored, reference)):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        results.append(torch.autograd.grad(y.float().square().sum(), [x, *owner.parameters()]))
    assert relative_error(*results) < 1e-2


class Side(nn.Module):
    """Blocks that read a value with a gradient from outside the chain; a state is handed out as well."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, scale):
        memory = torch.sigmoid(self.memory(scale))
        states = []
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * memory
            states.append(x)
        return torch.cat([states[0], x])


def test_side_values_and_taps():
    model = Side().double()
    reference = copy.deepcopy(model)
    inputs = rows(), rows()
    net = torch.compile(model, backend=mfx.backend(0.8, "aot_eager"), fullgraph=True)
    expected = gradients(mfx.momentumize(reference, 0.8, reversible=False), reference, *inputs)
    assert relative_error(gradients(net, model, *inputs), expected) < 1e-10


def test_channels_last():
    model, x = ConvNet(2, p=0.0).to(memory_format=torch.channels_last), images()
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    reference = copy.deepcopy(model)
    net = torch.compile(model, backend=mfx.backend(0.9, "aot_eager"), fullgraph=True)
    expected = gradients(mfx.momentumize(reference, 0.9, reversible=False), reference, x)
    assert relative_error(gradients(net, model, x), expected) < 1e-10


@pytest.mark.parametrize("draw", [F.rrelu, F.dropout, F.alpha_dropout, F.feature_alpha_dropout])
def test_whatever_a_branch_draws_it_draws_again(draw):
    class Random(nn.Linear):
        def forward(self, x):
            return x + draw(super().forward(x), training=True)

    net = torch.compile(nn.Sequential(Random(4, 4), Random(4, 4)).double(), backend=mfx.backend(0.9, "aot_eager"))

    def seeded(x):
        torch.manual_seed(0)
        return net(x)

    assert torch.autograd.gradcheck(seeded, (rows(2),), atol=1e-7, fast_mode=True)
    x = rows(2)
    assert torch.equal(seeded(x), seeded(x))


@pytest.mark.slow
def test_inductor():
    model, x = Net(2), rows(3)
    net = torch.compile(model, backend=mfx.backend(0.7), fullgraph=True)

    def seeded(x):
        torch.manual_seed(0)
        return net(x)

    assert torch.autograd.gradcheck(seeded, (x,), eps=1e-6, atol=1e-7, fast_mode=True)
