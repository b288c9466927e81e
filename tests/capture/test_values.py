"""Custom Functions keep their backward, and values that are tensors are tensors to Python."""

from __future__ import annotations

import builtins
import copy

import islands
import pytest
import torch
from graphs import net, prepared
from helpers import assert_same, run
from nets import Net, rows
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfx

X = torch.randn(3, 4, dtype=torch.float64)
GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.9])
CAPTURES = pytest.mark.parametrize("capture", ["fx", "dynamo"])


@GAMMAS
@CAPTURES
@pytest.mark.parametrize("branch", [islands.straight_through, islands.parted], ids=lambda branch: branch.__name__)
def test_a_function_in_a_branch_keeps_its_own_backward(branch, gamma, capture):
    model, x = islands.of_branches(branch), rows()
    mm = mfx.momentumize(model, gamma, capture=capture, example_inputs=x)
    assert mfx.report(model, x, capture=capture).rewritable == ["blocks.0", "blocks.1", "blocks.2"]
    assert_same(run(mm, x), run(islands.ByHand(copy.deepcopy(model), gamma), x))


@CAPTURES
def test_a_function_outside_of_every_chain_keeps_its_own_backward(capture):
    class Reversed(Net):
        def forward(self, x):
            up, down, sign = islands.Split.apply(super().forward(x), None)
            return islands.Steps.apply(self.head(self.blocks(self.stem(x))), -2.0), up, down, sign

    model, x = Reversed(), rows()
    mm = mfx.momentumize(model, 0.0, capture=capture, example_inputs=x)
    assert_same(run(mm, x), run(model, x))


def test_a_function_is_one_node_of_the_graph():
    def forward(self, x):
        return self.h(x) + self.f(islands.Steps.apply(self.g(x), 0.25))

    found = prepared(net(forward), capture="fx").found
    assert [node.name for node in found.flow.nodes if node.op == "call_function"] == ["steps_apply", "add"]


@GAMMAS
def test_a_function_with_its_own_precision_keeps_it_under_autocast(gamma):
    model, x = islands.of_branches(islands.lowered).float(), rows().float()

    mm = mfx.momentumize(model, gamma, capture="fx", example_inputs=x)
    by_hand = islands.ByHand(copy.deepcopy(model), gamma)
    for this in (mm, by_hand):
        this.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = this(x)
        out.float().sum().backward()
    for ours, theirs in zip(mm.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=0.02, atol=2e-3)


def test_a_function_of_constants_runs_as_it_is():
    def forward(self, x):
        fixed = islands.Steps.apply(torch.full((4,), 1.3, dtype=torch.float64), 1.0)
        return (x + self.f(x)) * fixed

    model = net(forward)
    assert_same(run(mfx.momentumize(model, 0.0, capture="fx"), X), run(model, X))


@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_under_a_checkpoint_are_the_blocks_that_they_hold(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return self.head(checkpoint(self.blocks, self.stem(x), use_reentrant=reentrant))

    model, x = Checkpointed(), rows()
    mm = mfx.momentumize(model, 0.0, capture="fx", example_inputs=x)
    assert len(mfx.report(model, capture="fx").rewritable) == 3
    plain = copy.deepcopy(model)
    plain.__class__ = Net
    assert_same(run(mm, x), run(plain, x))


def tensor_or_last(self, x):
    x = x if isinstance(x, torch.Tensor) else x[-1]
    return x + self.f(x)


def tensor_or_entry(self, x):
    x = x if torch.is_tensor(x) else x["x"]
    return x + self.f(x)


def inner_values(self, x):
    y = self.f(x) if isinstance(self.f(x), (list, torch.Tensor)) else self.g(x)
    z = y.relu() if torch.is_tensor(y * 2 + 1) and not isinstance(x.shape, torch.Tensor) else self.g(y)
    first, _ = z.chunk(2, -1)
    return x + (self.h(z) if isinstance(first, torch.Tensor) else z)


def parameters(self, x):
    y = self.f(x) * (2 if isinstance(self.f.weight, nn.Parameter) else 3)
    return x + (y if isinstance(self.f.weight, torch.Tensor) else self.g(y))


@pytest.mark.parametrize("forward", [tensor_or_last, tensor_or_entry, inner_values, parameters])
def test_values_that_are_tensors_are_tensors_to_python(forward):
    model = net(forward)
    mm = mfx.momentumize(model, 0.0, capture="fx")
    assert_same(run(mm, X), run(model, X))


def test_the_other_kind_of_argument_is_a_call_of_its_own():
    for forward, other in ((tensor_or_last, [2 * X, X]), (tensor_or_entry, {"x": 3 * X})):
        model = net(forward)
        mm = mfx.momentumize(model, 0.0, capture="fx")
        for given in (X, other, X):
            assert torch.equal(mm(given), model(given))


def test_a_value_that_may_be_a_tensor_or_not_is_asked_in_vain():
    def forward(self, x):
        value = torch.max(x, 1) if self.h.in_features else x
        return x + self.f(x) * (1 if isinstance(value, torch.Tensor) else 2)

    model = net(forward)
    with pytest.raises(mfx.CaptureError, match=r"whether max.* is a tensor.*capture='dynamo'"):
        mfx.momentumize(model, 0.0, capture="fx")
    assert_same(run(mfx.momentumize(model, 0.0, example_inputs=X), X), run(model, X))


def test_isinstance_is_pythons_own_again_after_a_capture():
    before = builtins.isinstance
    mfx.momentumize(net(tensor_or_last), capture="fx")
    assert builtins.isinstance is before
    with pytest.raises(mfx.CaptureError):
        mfx.momentumize(net(lambda self, x: x if x.sum() > 0 else x + self.f(x)), capture="fx")
    assert builtins.isinstance is before
    assert "__getattribute__" not in vars(torch.autograd.function.FunctionMeta)
