"""M13: inside of a captured part, what would be the plain network raises where it is called by itself."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, chain_names, run
from nets import Block, Net, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import mfx
from mfx.model.parts import parts_of

GAMMA = 0.8
CAPTURES = pytest.mark.parametrize("capture", ["fx", "dynamo"])


class Loop(Net):
    """Its chain runs in its own forward; with a switch as timm has it."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Around(Net):
    """Its chain runs in the stack; checkpointing runs the stack's blocks one by one, as timm does."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.grad_checkpointing:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
        else:
            x = self.blocks(x)
        return self.head(x)


class Nested(nn.Module):
    """Stages of blocks, all of one chain, in a model that runs the stages one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Net(2, p=0.0).blocks, Net(2, p=0.0).blocks])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def x_of(mm: Any, x: Tensor) -> Tensor:
    return mm.stem(x).detach()


def raises(owner: str) -> Any:
    return pytest.raises(
        mfx.EntryError, match=rf"(?s)chain of momentum steps.*{owner}.*original model.*set_gamma\(mm, 0\)"
    )


def momentumized(model: Any, x: Tensor, capture: str = "fx", **options: Any) -> Any:
    return mfx.momentumize(model, GAMMA, example_inputs=x, capture=capture, **options)


@CAPTURES
@pytest.mark.parametrize("kind", [Loop, Net])
def test_a_block_called_by_itself_raises_and_the_originals_does_not(kind: type[Net], capture: str) -> None:
    model, x = kind(p=0.0), rows()
    mm = momentumized(model, x, capture)
    y = x_of(mm, x)
    expected = mm(x)
    for place, block in enumerate(mm.blocks):
        with raises("Loop" if kind is Loop else "'blocks'"):
            block(y)
        with raises("Loop" if kind is Loop else "'blocks'"):
            block.forward(y)
        assert isinstance(block, Block)
        assert block.down is model.blocks[place].down
        block.down(block.up(y))
        model.blocks[place](y)
    with raises(""), torch.no_grad():
        mm.eval().blocks[0](y)
    torch.testing.assert_close(mm.train()(x), expected)


@CAPTURES
def test_a_stack_inside_of_what_is_captured_raises_as_a_whole_and_in_slices(capture: str) -> None:
    model, x = Nested(), torch.randn(5, 6, dtype=torch.float64)
    mm = momentumized(model, x, capture)
    assert len(chain_names(mm)) == 1
    for part in (mm.stages[0], mm.stages[0][:1], mm.stages[1], mm.stages[1][0], nn.Sequential(*mm.stages)):
        with raises("Nested"):
            part(x)
    assert len(mm.stages) == 2
    assert len(mm.stages[:1]) == 1
    model.stages[0](x)
    assert all(ours is theirs for ours, theirs in zip(mm.parameters(), model.parameters(), strict=True))
    assert list(mm.state_dict()) == list(model.state_dict())
    mm.double().train()(x).sum().backward()


@CAPTURES
def test_at_gamma_0_the_plain_block_is_the_same_function_and_runs(capture: str) -> None:
    model, x = Loop(p=0.0), rows()
    mm = momentumized(model, x, capture)
    y = x_of(mm, x)
    mfx.set_gamma(mm, {"blocks.1": 0.0, "*": 0.5})
    torch.testing.assert_close(mm.blocks[1](y), model.blocks[1](y))
    with raises("Loop"):
        mm.blocks[0](y)
    mfx.set_gamma(mm, 0.0)
    torch.testing.assert_close(mm.blocks[0](y), model.blocks[0](y))
    mfx.set_gamma(mm, 0.9)
    with raises("Loop"):
        mm.blocks[1](y)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "save"])
def test_copies_raise_with_their_own_gamma(copied: Callable[..., Any]) -> None:
    mm, x = momentumized(Loop(p=0.0), rows()), rows()
    twin, y = copied(mm), x_of(mm, x)
    mfx.set_gamma(mm, 0.0)
    mm.blocks[0](y)
    with raises("Loop"):
        twin.blocks[0](y)
    mfx.set_gamma(mm, GAMMA)
    mfx.set_gamma(twin, 0.0)
    twin.blocks[0](y)
    with raises("Loop"):
        mm.blocks[0](y)
    mfx.set_gamma(twin, GAMMA)
    torch.testing.assert_close(twin(x), mm(x))
    assert twin.blocks[0] is not mm.blocks[0]


@pytest.mark.parametrize("copied", [*COPIES, copy.copy], ids=["deepcopy", "pickle", "save", "copy"])
def test_a_block_copied_by_itself_is_the_plain_block(copied: Callable[..., Any]) -> None:
    model, x = Loop(p=0.0), rows()
    mm = momentumized(model, x)
    y, alone = x_of(mm, x), copied(mm.blocks[0])
    torch.testing.assert_close(alone(y), model.blocks[0](y))
    with raises("Loop"):
        mm.blocks[0](y)


def test_a_block_that_was_taken_out_is_the_plain_block() -> None:
    model, x = Loop(p=0.0), rows()
    mm = momentumized(model, x)
    y, taken = x_of(mm, x), mm.blocks[2]
    mm.blocks = mm.blocks[:2]
    torch.testing.assert_close(taken(y), model.blocks[2](y))
    with raises("Loop"):
        mm.blocks[0](y)


def test_the_model_is_not_changed_by_its_guards() -> None:
    model, x = Loop(p=0.0), rows()
    kinds = [type(module) for module in model.modules()]
    state = [dict(module.__dict__) for module in model.modules()]
    children = [dict(module._modules) for module in model.modules()]
    mm = momentumized(model, x)
    assert [type(module) for module in model.modules()] == kinds
    assert [dict(module.__dict__) for module in model.modules()] == state
    assert [dict(module._modules) for module in model.modules()] == children
    copy.deepcopy(model).blocks[0](x_of(mm, x))


@pytest.mark.parametrize("kind", [Loop, Net])
@pytest.mark.parametrize("gamma", [0.0, GAMMA])
def test_a_stack_with_a_block_without_guard_is_an_error(kind: type[Net], gamma: float) -> None:
    x = rows()
    new = Block(6, 0.0).double()
    for edit in (lambda blocks: setattr(blocks, "1", new), lambda blocks: blocks.append(new)):
        mm = mfx.momentumize(kind(p=0.0), gamma, example_inputs=x)
        edit(mm.blocks)
        with pytest.raises(mfx.PlanChangedError):
            mm(x)


@CAPTURES
def test_modules_taken_whole_raise_but_for_the_chain_itself(capture: str) -> None:
    model, x = Loop(), rows()
    mm = momentumized(model, x, capture, modules="blocks.*")
    stored = momentumized(model, x, capture, modules="blocks.*", reversible=False)
    assert_same(run(mm, x), run(stored, x))
    for each in (mm, stored):
        with raises("Loop"):
            each.blocks[0](x_of(mm, x))
    if capture == "fx":
        seen: list[str] = []
        handle = mm.blocks[0].register_forward_hook(lambda *_: seen.append("hook"))
        mm(x).sum().backward()
        assert seen == ["hook"]
        handle.remove()
    (chain,) = mfx.chains(mfx.momentumize(Loop(p=0.0), GAMMA, modules="blocks.*"))
    chain.forward(x_of(mm, x))


@pytest.mark.parametrize("is_residual", [True, False])
def test_layers_of_momentumnets_transformation_raise_where_they_add_x(is_residual: bool) -> None:
    mm = mfx.transform_to_momentumnet(Loop(p=0.0), "blocks", GAMMA, is_residual=is_residual, keep_first_layer=False)
    y = x_of(mm, rows())
    if is_residual:
        mm.blocks[0](y)  # a branch is one function everywhere
    else:
        with raises("Loop"):
            mm.blocks[0](y)


def test_a_models_own_checkpointing_of_single_blocks_raises_and_names_it() -> None:
    model, x = Around(p=0.0), rows()
    mm = momentumized(model, x)
    expected = mm(x)
    mm.grad_checkpointing = True
    with pytest.raises(mfx.EntryError, match="checkpointing calls its blocks one by one, switch that off"):
        mm(x)
    mm.grad_checkpointing = False
    torch.testing.assert_close(mm(x), expected)
    with raises("'blocks'"):
        checkpoint_sequential(list(mm.blocks), 2, x_of(mm, x), use_reentrant=False)


class Again(nn.Module):
    """Runs a layer of its encoder once more by itself; that add is left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Net(3, p=0.0)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.blocks[0](self.encoder(x).repeat(1, 3))


@CAPTURES
def test_a_block_that_the_model_itself_calls_elsewhere_is_free(capture: str) -> None:
    model, x = Again(), rows()
    mm = momentumized(model, x, capture, exclude="encoder.blocks.0#1")
    v, y = 0.0, model.encoder.stem(x)
    for block in model.encoder.blocks:
        v = GAMMA * v + (1 - GAMMA) * (block(y) - y)
        y = y + v
    torch.testing.assert_close(mm(x), model.encoder.blocks[0](model.encoder.head(y).repeat(1, 3)))


class Sum(nn.Module):
    """An addition."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other


class Summing(Block):
    """Its add runs in a module."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__(width, p)
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(x, self.down(torch.tanh(self.up(x))))


class Positions(Net):
    """Adds positions by the module that adds in its first block."""

    def __init__(self) -> None:
        super().__init__(p=0.0, block=Summing)
        self.positions = nn.Parameter(torch.randn(6).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.blocks[0].sum(self.stem(x), self.positions)))


@CAPTURES
def test_a_module_with_an_add_that_the_model_calls_elsewhere_is_free(capture: str) -> None:
    model, x = Positions(), rows()
    mm = momentumized(model, x, capture)
    assert set(parts_of(mm)) == {"blocks"}
    v, y = 0.0, model.stem(x) + model.positions
    for block in model.blocks:
        v = GAMMA * v + (1 - GAMMA) * (block(y) - y)
        y = y + v
    torch.testing.assert_close(mm(x), model.head(y))
    with raises("'blocks'"):
        mm.blocks[1].sum(y, y)


class Keeps(Loop):
    """Reaches its blocks by a plain list."""

    def __init__(self) -> None:
        super().__init__(p=0.0)
        self.kept = list(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.kept:
            x = block(x)
        return self.head(x)


@CAPTURES
def test_a_model_that_keeps_its_blocks_elsewhere_runs_as_momentum(capture: str) -> None:
    model, x = Keeps(), rows()
    mm = momentumized(model, x, capture)
    v, y = 0.0, model.stem(x)
    for block in model.blocks:
        v = GAMMA * v + (1 - GAMMA) * (block(y) - y)
        y = y + v
    torch.testing.assert_close(mm(x), model.head(y))


@pytest.mark.parametrize("kind", [Loop, Net])
def test_compiled_a_block_alone_raises_and_the_model_is_one_graph(kind: type[Net], fresh_dynamo: None) -> None:
    model, x = kind(p=0.0), rows()
    mm = momentumized(model, x)
    y = x_of(mm, x)
    net = torch.compile(mm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(net(x), mm(x))
    alone = torch.compile(mm.blocks[0], backend="eager")
    with pytest.raises(Exception, match="would be the plain network"):
        alone(y)
    mfx.set_gamma(mm, 0.0)
    torch.testing.assert_close(torch.compile(mm.blocks[0], backend="eager")(y), model.blocks[0](y))
    mfx.set_gamma(mm, GAMMA)
    with pytest.raises(Exception, match="would be the plain network"):
        torch.compile(mm.blocks[0], backend="eager")(y)
    torch.testing.assert_close(net(x), mm(x))


def test_what_is_compiled_in_place_is_its_own(fresh_dynamo: None) -> None:
    model, x = Loop(p=0.0), rows()
    model.blocks[0].compile(backend="eager")
    mm = momentumized(model, x)
    y = x_of(mm, x)
    model.blocks[0](y)
    with raises("Loop"):
        mm.blocks[0](y)
    mm.blocks[1].compile(backend="eager")
    model.blocks[1](y)
    mm(x)


def test_torchs_tools_on_a_block_alone_raise() -> None:
    model, x = Loop(p=0.0), rows()
    mm = momentumized(model, x)
    y = x_of(mm, x)
    with raises("Loop"):
        torch.jit.trace(mm.blocks[0], y)
    with raises("Loop"):
        torch.jit.script(mm.blocks[0])
    mfx.set_gamma(mm, 0.0)
    torch.testing.assert_close(torch.jit.script(mm.blocks[0])(y), model.blocks[0](y))


class Halves(Loop):
    """Its forward is two methods."""

    def first(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.blocks[2](self.blocks[1](x)))


def test_compiled_a_method_that_runs_a_part_raises_and_the_model_is_one_graph(fresh_dynamo: None) -> None:
    mm, x = momentumized(Halves(p=0.0), rows()), rows()
    torch.testing.assert_close(torch.compile(mm, fullgraph=True, backend="aot_eager")(x), mm(x))
    with pytest.raises(Exception, match="would be the plain network"):
        torch.compile(mm.first, backend="eager")(x)
