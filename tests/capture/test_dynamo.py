"""Dynamo capture: the same plan and the same numbers as symbolic tracing, and models that tracing cannot follow."""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import assert_same, chain_names, run
from nets import Block, ConvNet, Net, images, rows
from recurrence import NetByHand
from torch import Tensor, nn

import mfx
from mfx.model.conversion import momentum_of
from mfx.model.parts import parts_of


class Branching(Net):
    """Python that looks at sizes and at values of the call, an optional argument, and a dict as output."""

    def forward(self, x: Tensor, scale: Tensor | None = None, flags: Any = None) -> dict[str, Any]:
        """The head's value, doubled for more than four rows."""
        y = self.blocks(self.stem(x))
        if len(x) > 4:
            y = y * 2
        if scale is not None:
            y = y * scale
        return {"y": self.head(y), "flags": flags}


def captures(mm: nn.Module) -> int:
    """How many graphs there are."""
    return len(momentum_of(mm).entries)


def by_dynamo(model: nn.Module, inputs: Any, gamma: Any = 0.9, **options: Any) -> Any:
    """Momentumized from a Dynamo capture."""
    return mfx.momentumize(model, gamma, example_inputs=inputs, capture="dynamo", **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "swin_t", "vit_b_16"])
def test_both_captures_give_the_same_names_and_chains(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None, **({"image_size": 32} if name == "vit_b_16" else {}))
    inputs = torch.randn(2, 3, 32, 32)
    made = [mfx.momentumize(model, example_inputs=inputs, capture=capture) for capture in ("fx", "dynamo")]
    assert chain_names(made[0]) == chain_names(made[1])
    one, other = ({path: part.places for path, part in parts_of(mm).items()} for mm in made)
    assert one == other


@pytest.mark.parametrize("velocity", ["zero", "first", "learned"])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize(("make", "inputs"), [(Net, rows()), (ConvNet, images())])
def test_both_captures_compute_the_same(make: Any, inputs: Tensor, gamma: float, velocity: Any) -> None:
    model = make()
    if velocity == "learned":
        shared = nn.PReLU(init=0.3, dtype=torch.float64)
        velocity = lambda chain: shared  # noqa: E731
    for reversible in (True, False):
        fx = mfx.momentumize(model, gamma, capture="fx", velocity=velocity, reversible=reversible)
        assert_same(
            run(by_dynamo(model, inputs, gamma, velocity=velocity, reversible=reversible), inputs), run(fx, inputs)
        )
    if gamma == 0 and velocity == "zero":
        assert_same(run(by_dynamo(model, inputs, gamma), inputs), run(model, inputs))


def test_auto_falls_back_to_dynamo_where_tracing_fails() -> None:
    model, x = Branching(), rows()
    mm = mfx.momentumize(model, 0.0, example_inputs=x)
    assert momentum_of(mm).options.capture == "dynamo"
    assert_same(run(mm, x), run(model, x))


def test_without_example_inputs_auto_names_the_failure_and_the_remedy() -> None:
    with pytest.raises(mfx.CaptureError, match=r"(?s)symbolic tracing stopped.*Dynamo.*pass example_inputs="):
        mfx.momentumize(Branching())


def test_dynamo_needs_example_inputs() -> None:
    with pytest.raises(mfx.CaptureError, match="pass example_inputs="):
        mfx.momentumize(Net(), capture="dynamo")


def test_new_shapes_arguments_and_modes_are_captured_anew_with_the_same_chains() -> None:
    model = Branching()
    mm = by_dynamo(model, rows(), 0.0)
    chains = chain_names(mm)
    scale = torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True)
    for x, kwargs in ((rows(3), {}), (rows(7), {}), (rows(9), {}), (rows(3), {"scale": scale, "flags": ("a", 1)})):
        for training in (True, False):
            mm.train(training)
            model.train(training)
            assert_same(run(mm, x, **kwargs), run(model, x, **kwargs))
    mm(rows())
    known = captures(mm)
    mm(rows())
    assert captures(mm) == known
    assert chain_names(mm) == chains


def test_outputs_keep_their_form() -> None:
    mm = by_dynamo(Branching(), rows())
    flags = {"a": [1, None]}
    output = mm(rows(), flags=flags)
    assert set(output) == {"y", "flags"}
    assert output["flags"] is flags


def test_part_of_a_model_in_eval_mode_stays_so() -> None:
    model = Net()
    x = rows()
    mm = by_dynamo(model, x, 0.0)
    run(mm, x)
    model.blocks[1].eval()
    assert_same(run(mm, x), run(model, x))


def test_pickle_deepcopy_and_state_dict_are_the_models_own() -> None:
    model = Branching()
    x = rows()
    mm = by_dynamo(model, x)
    expected = run(mm, x)
    assert list(mm.state_dict()) == list(model.state_dict())
    assert isinstance(mm, Branching)
    file = io.BytesIO()
    torch.save(mm, file)
    file.seek(0)
    for twin in (copy.deepcopy(mm), pickle.loads(pickle.dumps(mm)), torch.load(file, weights_only=False)):
        assert_same(run(twin, x), expected)
        assert chain_names(twin) == chain_names(mm)
        with torch.no_grad():
            twin.head.weight.zero_()
        assert_same(run(mm, x), expected)


def test_a_replaced_head_is_used() -> None:
    mm = by_dynamo(Branching(), rows())
    mm.head = nn.Linear(6, 3).double()
    assert mm(rows())["y"].shape == (5, 3)


def test_hooks_run_also_where_they_are_added_later() -> None:
    model = Net()
    x = rows()
    mm = by_dynamo(model, x, 0.0)
    before = run(mm, x)
    handle = model.stem.register_forward_hook(lambda module, args, output: output * 2)
    assert_same(run(mm, x), run(model, x))
    handle.remove()
    assert_same(run(mm, x), before)


def test_capturing_leaves_random_generators_and_modules_as_they_are() -> None:
    model, x = Branching(), rows()
    state, python = torch.get_rng_state(), random.getstate()
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    by_dynamo(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


class Breaks(Net):
    """Leaves Python for a value of a tensor between two adds of its own, which no module has that could be linked."""

    def forward(self, x: Tensor) -> Tensor:
        """Blocks, as long as values are small."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block.down(block.up(x))
            if x.sum().item() > 1e6:
                break
        return self.head(x)


def test_a_graph_break_is_an_error_that_says_where() -> None:
    with pytest.raises(mfx.CaptureError, match=r"(?s)one graph.*test_dynamo.py.*\.item\(\)"):
        by_dynamo(Breaks(), rows())


class Changing(Net):
    """Leaves out the last residual connection in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """The head's value."""
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        last = self.blocks[2]
        return self.head(x + F.relu(last.up(x))[:, :6] if self.training else x.relu() + last.up(x)[:, :6])


def test_other_chains_in_another_mode_are_an_error() -> None:
    mm = by_dynamo(Changing(), rows())
    mm.eval()
    with pytest.raises(mfx.errors.PlanChangedError, match="exclude"):
        mm(rows())


def test_set_gamma_reaches_all_captures() -> None:
    model, x = Branching(), rows()
    mm = by_dynamo(model, x, 0.9)
    mfx.set_gamma(mm, 0.0)
    assert_same(run(mm, x), run(model, x))


def test_report_and_verify_take_models_that_only_dynamo_follows() -> None:
    report = mfx.report(Branching(), rows())
    assert report.rewritable == [f"blocks.{index}" for index in range(3)]
    assert report.blocks[0].shape == (5, 6)
    assert report.blocks[0].parameters == sum(p.numel() for p in Block().parameters())
    assert report.memory is not None
    assert 0 < report.memory.after < report.memory.before
    assert mfx.verify(Branching(), rows()).ok


class Mapped(Net):
    """A transform of functions in the model, whose tensors are of no use outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.vmap(lambda row: row * torch.sigmoid(row).sum())(self.stem(x))))


def test_a_transform_inside_of_the_model_is_captured() -> None:
    model, x = Mapped(), rows()
    mm = by_dynamo(model, x, 0.0)
    assert chain_names(mm) == (("blocks.0", "blocks.1", "blocks.2"),)
    assert_same(run(mm, x), run(model, x))


def test_report_agrees_with_that_of_the_other_capture() -> None:
    model = ConvNet()
    one, other = (mfx.report(model, images(), capture=capture) for capture in ("fx", "dynamo"))
    assert one.rewritable == other.rewritable
    assert [row.parameters for row in one.blocks] == [row.parameters for row in other.blocks]
    assert [row.shape for row in one.blocks] == [row.shape for row in other.blocks]


class Chosen(nn.Module):
    """x + down(dropout(gelu(up(x)))), of those rows alone that are positive on the whole: a size from data."""

    def __init__(self, width: int = 6, p: float = 0.2) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x.sum(1) > 0).nonzero().flatten()
        if len(rows) == 0:
            return x + self.down(x)
        return x + torch.zeros_like(x).index_put((rows,), self.down(self.dropout(F.gelu(self.up(x[rows])))))


class ByNet(Net):
    """The same network, its loop as a MomentumNet."""

    def __init__(self, model: Net, gamma: float) -> None:
        super().__init__(0)
        self.stem, self.blocks, self.head = model.stem, model.blocks, model.head
        self.run = mfx.MomentumNet(list(model.blocks), gamma, is_residual=False, use_backprop=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.stem(x)))


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_the_remedy_for_sizes_from_data_inside_of_blocks_is_right(gamma: float) -> None:
    torch.manual_seed(0)
    model, x = Net(3, block=Chosen), rows()
    with pytest.raises(mfx.CaptureError, match=r"mfx\.MomentumNet\(blocks, gamma, is_residual=False"):
        mfx.momentumize(model, gamma, example_inputs=x)
    net = ByNet(model, gamma)
    got, expected = run(net, x), run(NetByHand(model, gamma) if gamma else model, x)
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(got.grads[name], gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.outputs, expected.outputs, rtol=1e-10, atol=1e-12)
