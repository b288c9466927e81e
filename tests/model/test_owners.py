"""M13: a momentumized model is one function by every way in; what is not rewritten stays the model's own Python."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, chain_names, run
from nets import Block, ConvNet, Net, images, rows
from torch import Tensor, nn
from torchvision.models import resnet18

import mfx
from mfx.graph.notes import STATE
from mfx.model.parts import parts_of

GAMMA = 0.8


def recurrence(blocks: Any, x: Tensor) -> Tensor:
    """The momentum net of residual blocks, by plain autograd."""
    v = torch.zeros_like(x)
    for block in blocks:
        v = GAMMA * v + (1 - GAMMA) * (block(x) - x)
        x = x + v
    return x


class Methods(Net):
    """Forward is two methods, one of which runs the blocks, from a list."""

    def encode(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def decode(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class Halves(Net):
    """One chain, half of it in each of two methods."""

    def __init__(self) -> None:
        super().__init__(4)

    def first(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        return x

    def second(self, x: Tensor) -> Tensor:
        for block in self.blocks[2:]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))))


class Stacks(nn.Module):
    """Encoder and decoder, stacks that do not form one chain."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bridge, self.decoder = Net(3, p=0.0).blocks, nn.Linear(6, 4), Net(2, 4, p=0.0).blocks
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.bridge(self.encoder(x)))


CAPTURES = pytest.mark.parametrize("capture", ["fx", "dynamo"])


def momentumized(model: nn.Module, x: Tensor, capture: str) -> nn.Module:
    return mfx.momentumize(model, GAMMA, example_inputs=x, capture=capture)


@CAPTURES
def test_a_method_that_runs_the_chain_is_momentum_when_called_alone(capture: str) -> None:
    model, x = Methods(p=0.0), rows()
    mm = momentumized(model, x, capture)
    features = recurrence(model.blocks, model.stem(x))
    torch.testing.assert_close(mm.encode(x), features)
    torch.testing.assert_close(mm(x), model.head(features))
    torch.testing.assert_close(mm.decode(features), model.head(features))
    found = torch.autograd.grad(mm.encode(x).square().sum(), list(model.blocks.parameters()))
    expected = torch.autograd.grad(features.square().sum(), list(model.blocks.parameters()))
    torch.testing.assert_close(found, expected)


@CAPTURES
def test_methods_that_run_parts_of_one_chain_raise_when_called_alone(capture: str) -> None:
    model, x = Halves(), rows()
    mm = momentumized(model, x, capture)
    assert chain_names(mm) == (("blocks.0", "blocks.1", "blocks.2", "blocks.3"),)
    mm(x).sum().backward()
    for method in ("first", "second"):
        with pytest.raises(mfx.EntryError, match=rf"Halves\.{method} runs blocks of a momentum chain"):
            getattr(mm, method)(mm.stem(x))
    again = pickled(mm)
    with pytest.raises(mfx.EntryError, match="would be the plain network"):
        again.first(mm.stem(x))
    assert again(x).shape == mm(x).shape


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@CAPTURES
@pytest.mark.parametrize("copied", [lambda mm: mm, copy.deepcopy, pickled], ids=["itself", "deepcopy", "pickle"])
def test_stacks_called_one_by_one_are_what_they_are_in_the_model(copied: Callable[..., Any], capture: str) -> None:
    model, x = Stacks(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mm = copied(momentumized(model, x, capture))
    memory = recurrence(model.encoder, x)
    torch.testing.assert_close(mm.encoder(x), memory)
    memory = model.bridge(memory)
    torch.testing.assert_close(mm.decoder(memory), recurrence(model.decoder, memory))
    torch.testing.assert_close(mm(x), recurrence(model.decoder, memory))
    assert set(parts_of(mm)) == {"encoder", "decoder"}
    assert chain_names(mm) == tuple(
        tuple(f"{name}.{i}" for i in range(n)) for name, n in (("encoder", 3), ("decoder", 2))
    )


def test_chains_are_numbered_and_named_through_the_whole_model() -> None:
    mm = mfx.momentumize(Stacks(), {"encoder.*": 0.5, "decoder.*": 0.25})
    assert [chain.name for chain in mfx.chains(mm)] == ["momentum_0", "momentum_1"]
    assert [chain.gammas for chain in mfx.chains(mm)] == [(0.5,) * 3, (0.25,) * 2]
    mfx.set_gamma(mm, {"encoder.1": 0.1, "*": 0.3})
    assert [chain.gammas for chain in mfx.chains(mm)] == [(0.3, 0.1, 0.3), (0.3, 0.3)]
    mm(torch.randn(5, 6, dtype=torch.float64)).sum().backward()
    assert set(mfx.drift(mm)) == {"momentum_0", "momentum_1"}
    assert [row.chain for row in mfx.report(Stacks()).blocks] == [0, 0, 0, 1, 1]


class WithLoss(Net):
    """Its forward looks at values and computes a loss."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        if target is not None and float(target.sum()) > 0:
            return {"logits": y, "loss": (y - target).square().mean()}
        return {"logits": y}


def test_what_a_forward_does_around_its_blocks_stays_its_own() -> None:
    model, x = WithLoss(), rows()
    mm = mfx.momentumize(model, 0.0, example_inputs=(x,))
    for target in (None, torch.ones(5, 2).double(), -torch.ones(5, 2).double()):
        assert_same(run(mm, x, target), run(model, x, target))


def test_hooks_outside_of_the_chain_run_and_those_inside_are_told() -> None:
    model, seen = Net(), []
    for module in (model, model.stem, model.blocks, model.head):
        module.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    mm = mfx.momentumize(model, GAMMA)
    mm(rows())
    assert seen == ["Linear", "Sequential", "Linear", "Net"]


class Listed(Net):
    """Reaches its stack by a plain list."""

    def __init__(self) -> None:
        super().__init__(p=0.0)
        self.reached = [self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reached[0](self.stem(x)))


class Bound(Net):
    """Reaches its stack by a bound method kept as an attribute."""

    def __init__(self) -> None:
        super().__init__(p=0.0)
        self.body = self.run_body

    def run_body(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


@CAPTURES
@pytest.mark.parametrize("kind", [Listed, Bound])
def test_a_stack_that_is_not_reached_by_children_is_captured_with_the_root(kind: type[Net], capture: str) -> None:
    model, x = kind(), rows()
    mm = momentumized(model, x, capture)
    torch.testing.assert_close(mm(x), model.head(recurrence(model.blocks, model.stem(x))))


class Twice(Net):
    """Runs its stack twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.blocks(self.stem(x)).flip(0)))


def test_a_stack_that_runs_twice_counts_its_blocks_on() -> None:
    model, x = Twice(p=0.0), rows()
    mm = mfx.momentumize(model, GAMMA)
    names = [f"blocks.{i}" for i in range(3)]
    assert chain_names(mm) == (tuple(f"{n}#0" for n in names), tuple(f"{n}#1" for n in names))
    inner = recurrence(model.blocks, model.stem(x)).flip(0)
    torch.testing.assert_close(mm(x), model.head(recurrence(model.blocks, inner)))


class Shared(nn.Module):
    """One stack under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net(p=0.0).blocks.double()
        self.alias = self.body
        self.outer = nn.ModuleDict({"again": self.body})

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_module_under_several_names_has_one_shell() -> None:
    model, x = Shared(), torch.randn(5, 6, dtype=torch.float64)
    mm = mfx.momentumize(model, GAMMA)
    assert mm.alias is mm.body
    assert mm.outer["again"] is mm.body
    torch.testing.assert_close(mm.outer["again"](x), recurrence(model.body, x))


def test_the_owner_of_a_resnets_chains_are_its_layers() -> None:
    model = resnet18(weights=None)
    mm = mfx.momentumize(model)
    assert type(mm) is type(model)
    assert set(parts_of(mm)) == {"layer1", "layer2.1", "layer3.1", "layer4.1"}
    assert list(mm.state_dict()) == list(model.state_dict())
    assert all(ours is theirs for ours, theirs in zip(mm.parameters(), model.parameters(), strict=True))
    with pytest.raises(mfx.OptionError, match=r"4 captured parts \(layer1, layer2\.1"):
        mfx.graph_of(mm)


def test_an_object_of_a_momentumized_class_without_a_momentum_side_is_refused() -> None:
    mm = mfx.momentumize(Net())
    with pytest.raises(mfx.InputTypeError, match="a slice of it"):
        mm.blocks[:2](torch.randn(5, 6).double())


def test_buffers_and_generators_are_untouched_by_momentumize() -> None:
    model, x = ConvNet(), images()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    for capture in ("fx", "dynamo"):
        mfx.momentumize(model, GAMMA, example_inputs=x, capture=capture)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_momentumize_twice_is_refused_and_a_part_inside_another_model_is_not() -> None:
    inner = mfx.momentumize(Net(), GAMMA)
    with pytest.raises(mfx.OptionError, match="momentumized already"):
        mfx.momentumize(inner)
    outer = nn.Sequential(inner, nn.Linear(2, 6).double(), Net().blocks)
    mm = mfx.momentumize(outer, 0.3)
    assert set(parts_of(mm)) == {"0.blocks", "2"}
    assert [chain.gammas[0] for chain in mfx.chains(mm)] == [GAMMA, 0.3]


def test_compiled_shells_are_one_graph_and_the_same(fresh_dynamo: None) -> None:
    model = Stacks()
    mm = mfx.momentumize(model, GAMMA)
    x = torch.randn(5, 6, dtype=torch.float64)
    net = torch.compile(mm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(net(x), mm(x))
    found = torch.autograd.grad(net(x).square().sum(), list(mm.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(mm(x).square().sum(), list(mm.parameters())))


class OnePart(nn.Module):
    """Looks at its input before a stack that can be followed, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(p=0.0)

    def forward(self, x: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        if x.max() > 100 or torch.nonzero(x).numel() == 0:
            raise ValueError("not an image")
        y = self.net(x)
        return sum(((y - t["y"]) ** 2).sum() for t in targets if t["y"].any())  # type: ignore[return-value]


def test_a_model_that_can_be_followed_in_parts_only_is_captured_in_parts() -> None:
    model, x = OnePart(), rows()
    targets = [{"y": torch.randn(5, 2).double()}, {"y": torch.zeros(5, 2).double()}]
    with pytest.raises(mfx.CaptureError):
        mfx.momentumize(model)
    found = mfx.report(model, (x, targets))
    assert found.rewritable == ["net.blocks.0", "net.blocks.1", "net.blocks.2"]
    assert found.memory is not None
    mm = mfx.momentumize(model, GAMMA, example_inputs=(x, targets))
    y = model.net.head(recurrence(model.net.blocks, model.net.stem(x)))
    expected = ((y - targets[0]["y"]) ** 2).sum()
    loss = mm(x, targets)
    torch.testing.assert_close(loss, expected)
    wanted = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted))
    with pytest.raises(ValueError, match="not an image"):
        mm(1000 + x, targets)
    with pytest.raises(mfx.OptionError, match="exclude='nothing' matches no block"):
        mfx.momentumize(model, example_inputs=(x, targets), exclude="nothing")
    assert STATE not in mm.__dict__
    assert_same(run(mfx.momentumize(model, 0.0, example_inputs=(x, targets)), x, targets), run(model, x, targets))


def test_a_block_named_by_patterns_is_the_same_block_in_a_part() -> None:
    model = Stacks()
    mm = mfx.momentumize(model, GAMMA, exclude=["encoder.1", "decoder.*"])
    assert chain_names(mm) == (("encoder.0",), ("encoder.2",))
    x = torch.randn(5, 6, dtype=torch.float64)
    y = recurrence(model.encoder[2:], model.encoder[1](recurrence(model.encoder[:1], x)))
    torch.testing.assert_close(mm(x), model.decoder(model.bridge(y)))
    assert isinstance(model.encoder[0], Block)


def test_a_method_that_runs_the_blocks_is_captured_without_example_inputs() -> None:
    """The call that is noted while forward is traced holds symbolic values, which nobody else keeps."""
    model, x = Methods(p=0.0), rows()
    mm = mfx.momentumize(model, 0.9)
    assert torch.equal(mm.head(mm.encode(x)), mm(x))
    stored = mfx.momentumize(model, 0.9, reversible=False)
    assert_same(run(mm, x), run(stored, x))
    assert not torch.allclose(mm(x), model(x))
