"""A budget of bytes under torch.compile: what is kept, gradients under dropout and batch norm, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compiled import driven, gradients, recording, segments
from helpers import relative_error
from nets import ConvNet, Net, images, rows
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import mfx
from mfx import kept_bytes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Headed(ConvNet):
    """A stem and a head with activations, batch norm and dropout of their own."""

    def __init__(self, depth: int = 2, p: float = 0.2) -> None:
        super().__init__(depth, p=p)
        self.first, self.last = nn.BatchNorm2d(6).double(), nn.BatchNorm2d(6).double()
        self.p = p

    def forward(self, x):
        x = F.dropout(F.gelu(self.first(self.stem(x))), self.p, self.training)
        x = self.blocks(x)
        x = F.gelu(self.last(F.gelu(x)))
        return self.head(F.dropout(x, self.p, self.training).exp().mean((2, 3)))


class Normed(Headed):
    """Without running statistics, which would tell runs under the same seed apart."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__(p=p)
        for norm in [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]:
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


# Inductor takes some ten times as long, and has one case of each kind.
@pytest.mark.parametrize(
    ("gamma", "budget", "inner", "dynamic"),
    [
        *((gamma, budget, "aot_eager", False) for gamma in (0.9, 0.0) for budget in (0.0, 0.5)),
        (0.9, 0.5, "aot_eager", True),
        (0.0, 0.0, "aot_eager", True),
        pytest.param(0.9, 0.5, "inductor", True, marks=pytest.mark.slow),
        pytest.param(0.0, 0.0, "inductor", False, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_stored_run_and_statistics_move_once(gamma, budget, inner, dynamic):
    model, x = Headed(p=0.0), images()
    reference = copy.deepcopy(model)
    stored = mfx.momentumize(reference, gamma, reversible=False)
    expected = gradients(stored, reference, x)
    for door in ("inside", "backend"):
        own = copy.deepcopy(model)
        if door == "inside":
            call = mfx.momentumize(own, gamma, example_inputs=x, activation_budget=budget)
            net = torch.compile(call, backend=inner, fullgraph=True, dynamic=dynamic)
        else:
            chosen = mfx.backend(gamma, inner, activation_budget=budget)
            net = torch.compile(own, backend=chosen, fullgraph=True, dynamic=dynamic)
        assert relative_error(gradients(net, own, x), expected) < 1e-9
        assert relative_error(dict(own.named_buffers()), dict(reference.named_buffers())) < 1e-12


@pytest.mark.parametrize("inner", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_masks_are_the_same_when_a_segment_runs_again(gamma, inner):
    model = Normed(p=0.3)
    net = torch.compile(model, backend=mfx.backend(gamma, inner, activation_budget=0.0), fullgraph=True)

    def seeded(x):
        torch.manual_seed(0)
        return net(x)

    x = images(2)
    assert not torch.equal(net(x), net(x))
    assert torch.autograd.gradcheck(seeded, (images(2),), eps=1e-6, atol=1e-6, fast_mode=True)


class Several(Headed):
    """Norms that add up their statistics in ways of their own, one of them run twice."""

    def __init__(self) -> None:
        super().__init__(p=0.0)
        self.first.momentum = 0.3
        self.each = nn.InstanceNorm2d(6, track_running_stats=True, momentum=0.2).double()

    def forward(self, x):
        x = self.each(F.gelu(self.first(F.gelu(self.first(self.stem(x))))))
        x = F.gelu(self.last(F.gelu(self.blocks(x))))
        return self.head(x.exp().mean((2, 3)))


@pytest.mark.parametrize("inner", BACKENDS)
@pytest.mark.parametrize("make", [Headed, Several])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_two_forwards_before_a_backward_move_statistics_twice(gamma, make, inner):
    model, reference = make(), None
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        nn.init.normal_(norm.running_mean)
    model.p = 0.0
    for block in model.blocks:
        block.drop_prob = 0.0
    reference = copy.deepcopy(model)

    def both(net):
        return lambda x: net(x) + net(x.flip(0) * 2).exp()

    x = images()
    expected = gradients(both(mfx.momentumize(reference, gamma, reversible=False)), reference, x)
    net = torch.compile(model, backend=mfx.backend(gamma, inner, activation_budget=0.0), fullgraph=True)
    assert relative_error(gradients(both(net), model, x), expected) < 1e-9
    assert relative_error(dict(model.named_buffers()), dict(reference.named_buffers())) < 1e-12


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_compiled_step_keeps_less_within_a_smaller_budget(gamma):
    """What operations themselves keep is what is planned by; an inner compiler may find ways to keep less."""

    def kept(budget):
        torch._dynamo.reset()
        model, x = Headed(4, p=0.2), images(8, 12)
        mm = mfx.momentumize(model, gamma, example_inputs=x, activation_budget=budget)
        net = torch.compile(mm, backend="eager", fullgraph=True)
        inside = kept_bytes(mm, [x], lambda: net(x))[0]
        torch._dynamo.reset()
        net = torch.compile(model, backend=mfx.backend(gamma, "eager", activation_budget=budget), fullgraph=True)
        return inside, kept_bytes(model, [x], lambda: net(x))[0]

    least, some, whole = kept(0.0), kept(0.5), kept(1.0)
    assert max(least) < 0.9 * min(whole)
    assert max(least) <= min(some)
    assert max(some) < 0.9 * min(whole)


def test_the_plan_is_that_of_eager_mode():
    model, x = Headed(4, p=0.2), images(8, 12)
    mm = mfx.momentumize(model, 0.9, example_inputs=x, activation_budget=0.0)
    torch.compile(mm, backend=recording, fullgraph=True)(x)
    eager = [node for node in mfx.graph_of(mm).nodes if node.name.startswith("segment")]
    assert len(segments(driven[0])) == len([n for n in eager if n.op == "call_function"]) > 0


def test_too_few_bytes_are_refused_with_the_least_that_is_possible():
    net = torch.compile(Net(2, p=0.0), backend=mfx.backend(0.9, "eager", activation_budget=10), fullgraph=True)
    with pytest.raises(BackendCompilerFailed, match=r"less than is possible: .* at least .* bytes"):
        net(rows())
    with pytest.raises(mfx.OptionError, match=r"activation_budget=1\.5 .*fraction"):
        mfx.backend(0.9, activation_budget=1.5)


class Random(Normed):
    """A head that draws after its own fashion."""

    def forward(self, x):
        return F.rrelu(super().forward(x), training=True).exp()


def test_whatever_a_segment_draws_it_draws_again():
    net = torch.compile(Random(), backend=mfx.backend(0.9, "aot_eager", activation_budget=0.0), fullgraph=True)

    def seeded(x):
        torch.manual_seed(0)
        return net(x)

    assert torch.autograd.gradcheck(seeded, (images(2),), eps=1e-6, atol=1e-6, fast_mode=True)


def test_double_backward_through_a_compiled_segment_raises():
    model, x = Headed(p=0.0), images()
    net = torch.compile(model, backend=mfx.backend(0.0, "eager", activation_budget=0.0), fullgraph=True)
    with pytest.raises(mfx.BackwardError, match=r"segment \d.*create_graph=True"):
        torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
