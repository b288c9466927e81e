"""Grad mode and autocast regions: each node runs under its own, in branches, outside of chains and around them."""

from __future__ import annotations

import copy

import islands
import pytest
import torch
from helpers import assert_same, relative_error, run
from nets import Net, rows
from torch import nn

import mfx

NAMES = ["blocks.0", "blocks.1", "blocks.2"]
CAPTURES = pytest.mark.parametrize("capture", ["fx", "dynamo"])
LOWER = pytest.mark.parametrize("lower", [False, True], ids=["plain", "autocast"])


class Under(nn.Module):
    """A model under bfloat16 autocast, or as it is."""

    def __init__(self, model: nn.Module, lower: bool) -> None:
        super().__init__()
        self.model, self.lower = model, lower

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.lower):
            return self.model(x)


@CAPTURES
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("branch", [islands.gate_without_gradient, islands.gate_by_decorator])
def test_what_a_branch_computes_without_gradient_gets_none(branch, gamma, capture):
    model, x = islands.of_branches(branch), rows()
    mm = mfx.momentumize(model, gamma, capture=capture, example_inputs=x)
    assert mfx.report(model, x, capture=capture).rewritable == NAMES
    assert_same(run(mm, x), run(islands.ByHand(copy.deepcopy(model), gamma), x))


@LOWER
@CAPTURES
@pytest.mark.parametrize("branch", [islands.float32_inside, islands.bfloat16_inside])
def test_an_autocast_island_in_a_branch_is_one_in_both_runs_of_it(branch, capture, lower):
    model, x = islands.of_branches(branch).float(), rows().detach().float().requires_grad_()
    assert mfx.report(model, x, capture=capture).rewritable == NAMES
    mm = mfx.momentumize(model, 0.0, capture=capture, example_inputs=x)
    assert_same(run(Under(mm, lower), x), run(Under(model, lower), x), 1e-6)


def test_the_dtypes_inside_an_island_are_those_of_the_original():
    model = islands.of_branches(islands.float32_inside).float()
    seen = []
    for block in model.blocks:
        block.norm.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
        block.one.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run(Under(model, True), rows().detach().float())
    expected = list(seen)
    mm = mfx.momentumize(model, 0.9, capture="fx")
    run(Under(mm, True), rows().detach().float())  # captures, and proves on fake tensors, with no hook run
    seen.clear()
    run(Under(mm, True), rows().detach().float())
    assert set(expected) == {torch.float32, torch.bfloat16}
    assert seen == expected  # hooks run once a step, and not again in backward


class Frozen(Net):
    """Its stem, or its chain too, learns only when asked to."""

    learns = (False, True)

    def forward(self, x):
        with torch.set_grad_enabled(self.learns[0]):
            x = self.stem(x)
        with torch.set_grad_enabled(self.learns[1]):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


@CAPTURES
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("learns", [(False, True), (True, False), (False, False)])
def test_regions_without_gradient_outside_of_branches_stay_so(learns, gamma, capture):
    class Of(Frozen):
        pass

    class Hand(Of):
        def forward(self, x):
            with torch.set_grad_enabled(learns[0]):
                x = self.stem(x)
            with torch.set_grad_enabled(learns[1]):
                x = islands.chain(self.blocks, x, gamma)
            return self.head(x)

    Of.learns = learns
    torch.manual_seed(5)
    model = Of(block=type("Own", (islands.Residual,), {"branch": islands.gate_without_gradient}))
    by_hand = copy.deepcopy(model)
    by_hand.__class__ = Hand
    x = rows()
    mm = mfx.momentumize(model, gamma, capture=capture, example_inputs=x)
    assert mfx.report(model, x, capture=capture).rewritable == NAMES
    assert_same(run(mm, x), run(by_hand, x))


def test_blocks_under_other_modes_than_the_block_before_are_a_chain_of_their_own():
    class Half(Net):
        def forward(self, x):
            x = self.stem(x)
            with torch.no_grad():
                x = self.blocks[0](x)
            return self.head(self.blocks[2](self.blocks[1](x)))

    torch.manual_seed(3)
    model, x = Half(), rows()
    assert [chain.blocks for chain in mfx.report(model, capture="fx").chains] == [
        ("blocks.0",),
        ("blocks.1", "blocks.2"),
    ]
    mm = mfx.momentumize(model, 0.0, capture="fx")
    assert_same(run(mm, x), run(model, x))


def test_a_chain_under_autocast_of_the_models_own_runs_under_it():
    class Lower(Net):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.blocks(self.stem(x))
            return self.head(x.float())

    torch.manual_seed(3)
    model, x = Lower().float(), rows().detach().float().requires_grad_()
    assert len(mfx.report(model, capture="fx").rewritable) == 3
    mm = mfx.momentumize(model, 0.0, capture="fx")
    assert_same(run(mm, x), run(model, x), 1e-6)


def test_inference_mode_inside_a_forward_is_kept():
    class Measured(Net):
        def forward(self, x):
            y = self.stem(x)
            with torch.inference_mode():
                size = self.head(y.detach()).square().mean()
            return self.head(self.blocks(y)), size

    model = Measured().eval()
    mm = mfx.momentumize(model, 0.0, capture="fx")
    (out, size), (expected, its_size) = mm(rows(3)), model(rows(3))
    assert size.is_inference()
    assert its_size.is_inference()
    assert not out.is_inference()
    assert out.requires_grad
    assert expected.requires_grad


def test_a_branch_value_without_gradient_is_handed_out_as_one():
    class Gates(Net):
        def forward(self, x):
            x, gates = self.stem(x), []
            for block in self.blocks:
                with torch.no_grad():
                    gate = torch.sigmoid(block.two(x))
                x = x + gate * block.one(x)
                gates.append(gate)
            return self.head(x), *gates

    torch.manual_seed(3)
    model, x = Gates(block=islands.Residual), rows()
    mm = mfx.momentumize(model, 0.0, capture="fx")
    assert len(mfx.report(model, capture="fx").rewritable) == 3
    assert [value.requires_grad for value in mm(x)] == [value.requires_grad for value in model(x)]
    assert_same(run(mm, x), run(model, x))


def test_modes_are_as_before_where_a_region_ends_in_an_error():
    class Fails(nn.Module):
        armed = False

        def forward(self, x):
            if self.armed:
                raise ValueError("armed")
            return x

    class Bad(Net):
        def forward(self, x):
            x = self.blocks(self.stem(x))
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fails(x)
            return self.head(x) + y.mean()

    model = Bad()
    model.fails = Fails()
    mm = mfx.momentumize(model, 0.9, capture="fx", modules="fails")
    mm(rows())
    mm.fails.armed = True
    with pytest.raises(ValueError, match="armed"):
        mm(rows())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_rewritten_graph_enters_and_leaves_modes_in_pairs():
    mm = mfx.momentumize(islands.of_branches(islands.straight_through), 0.9, capture="fx")
    assert "enter" not in str(mfx.graph_of(mm))
    graph = mfx.graph_of(mfx.momentumize(Frozen(), 0.9, capture="fx"))
    switches = [node.target.__name__ for node in graph.nodes if "switches" in getattr(node.target, "__module__", "")]
    assert switches == ["enter", "leave"]


@pytest.mark.parametrize("way", ["backend", "inside", "inside a region"])
@pytest.mark.parametrize("branch", [islands.gate_without_gradient, islands.float32_inside])
def test_regions_are_kept_by_a_compiler(branch, way):
    torch._dynamo.reset()
    model, x = islands.of_branches(branch).float().eval(), rows().detach().float()
    by_hand = islands.ByHand(copy.deepcopy(model), 0.9)
    if way == "backend":
        mm = torch.compile(model, backend=mfx.backend(0.9, inner="aot_eager"), fullgraph=True)
    elif way == "inside":
        mm = torch.compile(mfx.momentumize(model, 0.9), backend="aot_eager", fullgraph=True)
    else:
        mm = torch.compile(Under(mfx.momentumize(model, 0.9), True), backend="aot_eager", fullgraph=True)
        by_hand = Under(by_hand, True)
    own = list(model.parameters())
    tolerance = 3e-2 if way == "inside a region" else 1e-5
    loss, expected = mm(x).float().square().sum(), by_hand(x).float().square().sum()
    grads = torch.autograd.grad(loss, own, allow_unused=True)
    theirs = torch.autograd.grad(expected, list(by_hand.parameters()), allow_unused=True)
    assert [grad is None for grad in grads] == [grad is None for grad in theirs]
    assert relative_error([loss, *grads], [expected, *theirs]) < tolerance
