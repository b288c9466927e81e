"""A capture that is not what the model's own forward runs is refused, one that is, is not; nothing moves meanwhile."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import islands
import pytest
import torch
import torch.nn.functional as F
from graphs import net
from helpers import assert_same, run
from nets import Block, ConvNet, Net, images, rows
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mfx
from mfx.capture import as_call, capture_symbolic, prove
from mfx.graph.notes import MODES

X = torch.randn(3, 4, dtype=torch.float64)


def captured_of(model, *args):
    call = as_call(args)
    return capture_symbolic(model, type(model).forward, call.form), call


def verdict(model, captured, call):
    return prove(model, type(model).forward, captured, call)


def rich(self, x):
    """A number, a constant, a Function, a region, a draw, a dead value, and a size."""
    places = torch.arange(4, dtype=torch.float64).flip(0)
    self.g(x).exp()
    y = islands.Steps.apply(self.f(x + 0.1 * places), 0.5)
    with torch.no_grad():
        gate = torch.sigmoid(self.h(x))
    y = F.dropout(y * gate, 0.25, self.training)
    return x + y.view(x.shape[0], -1), gate


@pytest.fixture
def whole():
    model = net(rich)
    return model, *captured_of(model, X)


def test_a_faithful_capture_is_proven(whole):
    assert verdict(*whole)


def node_of(captured, name):
    return next(node for node in captured.graph.nodes if node.name == name)


def left_out(captured):
    node = node_of(captured, "sigmoid")
    node.replace_all_uses_with(node.args[0])


def another_number(captured):
    node = node_of(captured, "dropout")
    node.kwargs = {**node.kwargs, "p": 0.26}


def another_constant(captured):
    node = next(node for node in captured.graph.nodes if "constant" in node.name)
    node.target.value = node.target.value + 1


def another_layer(captured):
    node_of(captured, "f").target = "h"


def another_operand(captured):
    node = node_of(captured, "dropout").args[0]
    node.args = (node.args[1], node.args[0])


def another_order(captured):
    node_of(captured, "x").append(node_of(captured, "h"))


def through_the_function(captured):
    node_of(captured, "steps_apply").target = lambda x: (2 * x).round() / 2


def another_function(captured):
    node_of(captured, "steps_apply").target.function = Other


class Other(islands.Steps):
    """The same forward, and a backward of its own."""

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def lost_region(captured):
    node_of(captured, "sigmoid").meta[MODES] = captured.modes


def gained_region(captured):
    modes = node_of(captured, "sigmoid").meta[MODES]
    node_of(captured, "dropout").meta[MODES] = modes


def gained_autocast(captured):
    node = node_of(captured, "h")
    cpu, *others = captured.modes.autocast
    assert cpu == ("cpu", False, None)
    node.meta[MODES] = replace(captured.modes, autocast=(("cpu", True, torch.bfloat16), *others))


def swapped_outputs(captured):
    node = captured.graph.output_node()
    node.args = (list(reversed(node.args[0])),)


def a_detour(captured):
    node = node_of(captured, "view")
    with captured.graph.inserting_before(node):
        added = captured.graph.call_function(torch.neg, (node.args[0],))
        again = captured.graph.call_function(torch.neg, (added,))
    node.args = (again, *node.args[1:])


@pytest.mark.parametrize(
    "sabotage",
    [
        left_out, another_number, another_constant, another_layer, another_operand, another_order, through_the_function,
        another_function, lost_region, gained_region, gained_autocast, swapped_outputs, a_detour,
    ],
)  # fmt: skip
def test_a_capture_that_is_not_the_model_is_refused(whole, sabotage):
    model, captured, call = whole
    sabotage(captured)
    with pytest.raises(mfx.CaptureError, match="is not what its forward runs"):
        verdict(model, captured, call)


def test_the_refusal_names_the_line_of_python(whole):
    model, captured, call = whole
    another_number(captured)
    with pytest.raises(mfx.CaptureError, match=r"test_proof.py:\d+: y = F.dropout.*\n.*\(dropout\)[^?]*modules="):
        verdict(model, captured, call)


class Kept(Net):
    """A layer that is in no table of modules: tracing takes what it computes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [nn.Parameter(torch.ones(6, dtype=torch.float64))]

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x * torch.tanh(self.others[0]))


def test_what_tracing_loses_is_refused_before_the_first_output_and_left_to_dynamo():
    model, x = Kept(), rows()
    mm = mfx.momentumize(model, 0.0, capture="fx")
    with pytest.raises(mfx.CaptureError, match=r"the model runs aten.tanh.*test_proof.py:\d+: return self.head"):
        mm(x)
    mm = mfx.momentumize(model, 0.0)
    assert_same(run(mm, x), run(model, x))
    mm.others[0].grad = None
    run(mm, x)
    assert mm.others[0].grad is not None
    mm.others[0].grad = None


def test_a_refused_plan_is_forgotten():
    def forward(self, x):
        y = x + self.f(x)
        return y + self.g(y) if isinstance(self.f(x).shape, tuple) else y + self.g(y).relu()

    model = net(forward)
    mm = mfx.momentumize(model, 0.0)
    assert_same(run(mm, X), run(model, X))


def test_random_generators_buffers_gradients_and_hooks_stay_as_they_are():
    torch.manual_seed(4)
    model, x = ConvNet(), images()
    calls = []
    model.blocks[0].conv.register_forward_hook(lambda *args: calls.append("conv"))
    model.head.weight.register_hook(lambda grad: calls.append("grad"))
    captured, call = captured_of(model, x)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate()
    assert prove(model, ConvNet.forward, captured, call)
    assert not calls
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and type(parameter) is nn.Parameter for parameter in model.parameters())
    model(x)
    assert calls == ["conv"]


def test_a_first_step_counts_what_any_step_counts():
    torch.manual_seed(4)
    mm, counts = mfx.momentumize(Net(), 0.0, capture="fx"), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            mm(rows())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def sized_by_values(self, x):
    x = x + self.f(x)
    return x[x.sum(-1) > -100]


def test_a_model_whose_shapes_depend_on_values_is_proven_on_the_values():
    model = net(lambda self, x: sized_by_values(self, self.bn(x)), bn=nn.BatchNorm1d(4))
    captured, call = captured_of(model, X)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    assert verdict(model, captured, call)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    node_of(captured, "gt").args = (node_of(captured, "gt").args[0], -99)
    with pytest.raises(mfx.CaptureError, match="is not what its forward runs"):
        verdict(model, captured, call)


def test_a_report_for_inputs_without_values_needs_none():
    model = Net()
    meta = torch.empty(5, 4, dtype=torch.float64, device="meta")
    assert len(mfx.report(model, meta, capture="fx").rewritable) == 3
    with pytest.raises(mfx.CaptureError, match="is not what its forward runs"):
        mfx.report(Kept(), meta, capture="fx")


@pytest.mark.parametrize("training", [True, False])
def test_each_capture_is_proven_once_and_each_mode_is_one(training, monkeypatch):
    import mfx.model.state as state

    seen = []
    monkeypatch.setattr(state, "prove", lambda *args: seen.append(args[2]) or prove(*args))
    mm = mfx.momentumize(Net(), 0.9, capture="fx").train(training)
    for _ in range(3):
        mm(rows())
    assert len(seen) == 1
    with torch.no_grad():
        mm(rows()), mm(rows())
    assert len(seen) == 2


def under_a_transform(mm):
    torch.func.grad(lambda own: torch.func.functional_call(mm, own, (rows(),)).sum())(dict(mm.named_parameters()))


def under_a_trace(mm):
    torch.jit.trace(mm, (rows(),), check_trace=False)


def under_a_compiler(mm):
    torch.compile(mm, backend="eager")(rows())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("first", [under_a_transform, under_a_trace, under_a_compiler])
def test_where_a_proof_has_to_wait_the_next_plain_call_is_proven(first, monkeypatch):
    import mfx.model.state as state

    seen = []
    monkeypatch.setattr(state, "prove", lambda *args: seen.append(prove(*args)) or seen[-1])
    mm = mfx.momentumize(Net(), 0.9, capture="fx")
    first(mm)
    assert not any(seen)
    mm(rows()), mm(rows())
    assert seen.count(True) == 1


def test_lazy_parameters_wait_for_the_call_that_finds_their_shapes_there(monkeypatch):
    import mfx.model.state as state

    seen = []
    monkeypatch.setattr(state, "prove", lambda *args: seen.append(prove(*args)) or seen[-1])
    mm = mfx.momentumize(net(lambda self, x: x + self.k(x), k=nn.LazyLinear(4, dtype=torch.float64)), capture="fx")
    with torch.no_grad():
        mm(X)
    assert seen == [False]
    mm(X)
    assert seen == [False, True]


def test_a_part_with_a_graph_of_its_own_is_taken_whole_in_both_runs():
    model, x = Net(), rows()
    outer = nn.Sequential(mfx.momentumize(model, 0.9, capture="fx"), nn.Linear(2, 2).double())
    captured, call = captured_of(outer, x)
    assert verdict(outer, captured, call)


def test_transformers_and_shared_modules_are_proven():
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    model = net(lambda self, x, y: self.layer(self.layer(x, y), y), layer=layer)
    x, y = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    assert verdict(model, *captured_of(model, x, y))


class Notes(Net):
    """Keeps a feature of each call in a list, and counts in a dict of lists."""

    def __init__(self):
        super().__init__()
        self.features, self.counts = [], {"calls": [0]}

    def forward(self, x):
        self.counts["calls"][0] += 1
        y = super().forward(x)
        self.features.append(y.detach())
        return y


def test_what_a_model_collects_is_collected_once_a_call():
    model, x = Notes(), rows().detach()
    with pytest.raises(mfx.CaptureError, match="changes a list, dict or set"):
        mfx.momentumize(model, 0.0, capture="fx")
    assert model.counts["calls"] == [0]
    mm = mfx.momentumize(model, 0.0, example_inputs=x)
    for count in (1, 2, 3):
        y = mm(x)
        assert model.counts["calls"] == [count]
        assert len(model.features) == count
        assert type(model.features[-1]) is torch.Tensor
        torch.testing.assert_close(model.features[-1], y.detach())


class WritesFirst(Block):
    """x += f(x), the first thing that its stack does."""

    def forward(self, x):
        x += self.norm(torch.tanh(x))  # tanh keeps its value, so x may be written to
        return x


def test_a_part_that_writes_to_what_it_is_given_is_proven_as_the_model_calls_it():
    model, x = Net(block=WritesFirst), rows()
    assert_same(run(mfx.momentumize(model, 0.0), x), run(model, x))
