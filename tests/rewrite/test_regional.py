"""Blocks that were compiled in place: their branches are compiled once, and compute what they did."""

from __future__ import annotations

import copy

import pytest
import torch
from compiled import computing, gradients, handed, recording
from helpers import relative_error
from nets import ConvNet, Net, images, rows
from torch import nn

import mfx

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compile_blocks(model: nn.Module, backend=recording) -> None:
    for block in model.blocks:
        block.compile(backend=backend)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize(("make", "inputs", "name"), [(Net, rows, "gelu"), (ConvNet, images, "conv")])
def test_blocks_compiled_in_place_have_one_compiled_branch(make, inputs, name, gamma, before):
    model, x = make(4, p=0.0), inputs()
    reference = mfx.momentumize(copy.deepcopy(model), gamma, reversible=False)
    if before:
        compile_blocks(model)
    mm = mfx.momentumize(model, gamma)
    if not before:
        compile_blocks(mm)
    for _ in range(2):
        found, expected = gradients(mm, mm, x), gradients(reference, reference, x)
        assert relative_error(found, expected) < 1e-10
    assert relative_error(dict(mm.named_buffers()), dict(reference.named_buffers())) < 1e-12
    assert computing(name) == 1


def test_a_block_alone_may_be_compiled():
    mm, x = mfx.momentumize(Net(3, p=0.0), 0.9), rows()
    expected = gradients(mm, mm, x)
    mm.blocks[1].compile(backend=recording)
    assert relative_error(gradients(mm, mm, x), expected) < 1e-12
    assert len(handed) == 1


def test_masks_are_drawn_again():
    mm = mfx.momentumize(Net(2, p=0.3), 0.9)
    compile_blocks(mm, "aot_eager")

    def seeded(x):
        torch.manual_seed(0)
        return mm(x)

    assert torch.autograd.gradcheck(seeded, (rows(2),), eps=1e-6, atol=1e-7, fast_mode=True)


def test_what_modules_are_set_to_is_seen():
    mm, x = mfx.momentumize(Net(2, p=0.3), 0.9), rows()
    compile_blocks(mm)
    assert not torch.equal(mm(x), mm(x))
    mm.eval()
    expected = mm(x)
    for block in mm.blocks:
        block.train()
        block.dropout.p = 0.0
    assert relative_error(mm(x), expected) < 1e-12


def test_what_compiled_them_must_be_known():
    model = Net(2, p=0.0)
    model.blocks[0]._compiled_call_impl = lambda x: x
    with pytest.raises(mfx.CompileError, match=r"block 'blocks\.0' was compiled in place.*torch\.compile\(mm\)"):
        mfx.momentumize(model, 0.9)(rows())


@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_modules_inside_run(late):
    """Dynamo guards none: code that was compiled for a block without hooks would be used for one with."""
    model, x = Net(3, p=0.0), rows()
    mm = mfx.momentumize(model, 0.9)
    compile_blocks(mm)
    if late:
        mm(x)
    model.blocks[1].up.register_forward_hook(lambda module, args, value: value * 2)
    v, y = 0.0, model.stem(x)
    for block in model.blocks:
        v = 0.9 * v + 0.1 * (block(y) - y)
        y = y + v
    expected = torch.autograd.grad(model.head(y).square().sum(), [x, *model.parameters()])
    assert relative_error(list(gradients(mm, mm, x)[1]), list(expected)) < 1e-12


def test_within_a_budget():
    model, x = ConvNet(3, p=0.0), images()
    reference = mfx.momentumize(copy.deepcopy(model), 0.9, reversible=False)
    compile_blocks(model, "aot_eager")
    mm = mfx.momentumize(model, 0.9, example_inputs=x, activation_budget=0.0)
    assert relative_error(gradients(mm, mm, x), gradients(reference, reference, x)) < 1e-10


def drawing(gm, example_inputs):
    """A backend whose code draws another number first, so that its dropout has other masks than the eager one's."""

    def run(*given):
        torch.rand(())
        return gm(*given)

    return run


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_block_taken_whole_draws_alike_in_both_runs_from_the_first_step_on(gamma):  # M5
    """What its first run keeps elsewhere is followed by a mode under which Dynamo compiles nothing."""
    mm, x, along = mfx.momentumize(Net(3, p=0.3), gamma, modules="blocks.?"), rows(), rows().detach()
    compile_blocks(mm, drawing)

    def loss(at):
        torch.manual_seed(0)
        return mm(x + at * along).square().sum()

    for step in range(3):
        y = loss(0.0)
        slope = (torch.autograd.grad(y, x)[0] * along).sum()
        if step:  # the first one draws what the eager module does
            with torch.no_grad():
                torch.testing.assert_close(loss(0.0), y.detach())
                torch.testing.assert_close(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-6, atol=0)
        assert max(mfx.drift(mm).values()) < 1e-10
