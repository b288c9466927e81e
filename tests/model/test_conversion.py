"""Bad arguments, and models that cannot be captured: one clear error each, with the remedy."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from nets import Block, Net, rows
from torch import Tensor, nn

import mfx


@pytest.mark.parametrize(
    ("gamma", "error", "message"),
    [
        (1.0, mfx.OptionError, r"gamma=1\.0: at gamma >= 1 the velocity never takes in"),
        (1.5, mfx.OptionError, r"gamma=1\.5.*give a float in \[-1, 1\)"),
        (-1.1, mfx.OptionError, r"gamma=-1\.1: below -1 the velocity grows"),
        (math.nan, mfx.OptionError, "gamma is NaN"),
        (math.inf, mfx.OptionError, "gamma=inf"),
        ("0.9", mfx.InputTypeError, r"must be a float in \[-1, 1\) or a mapping.*not str"),
        (True, mfx.InputTypeError, "not bool"),
        (None, mfx.InputTypeError, "not NoneType"),
        (0.5j, mfx.InputTypeError, "not complex"),
        ([0.9, 0.5], mfx.InputTypeError, "not list"),
        (torch.tensor([9, 5]), mfx.InputTypeError, "give floating numbers"),
        ({}, mfx.OptionError, "gamma is an empty mapping"),
        ({"*": 2.0}, mfx.OptionError, r"gamma\['\*'\]=2\.0"),
        ({"*": "high"}, mfx.InputTypeError, r"gamma\['\*'\] must be"),
    ],
)
@pytest.mark.parametrize("call", [mfx.momentumize, lambda model, gamma: mfx.set_gamma(mfx.momentumize(model), gamma)])
def test_a_gamma_that_cannot_be_used(call: Any, gamma: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(Net(), gamma)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": "none"}, "velocity must be 'zero', 'first' or a factory"),
        ({"velocity": 0.0}, "velocity must be"),
        ({"state_dtype": torch.int64}, "state_dtype must be 'auto' or a floating dtype"),
        ({"state_dtype": "float64"}, "state_dtype must be"),
        ({"tolerance": 0}, "tolerance must be a float between 0 and 1"),
        ({"tolerance": 2.0}, "tolerance must be"),
        ({"tolerance": math.nan}, "tolerance must be"),
        ({"tolerance": "low"}, "tolerance must be"),
        ({"capture": "jit"}, "capture must be one of"),
        ({"include": 3}, "include takes fnmatch patterns"),
        ({"exclude": [nn.Linear]}, "exclude takes fnmatch patterns"),
    ],
)
def test_an_option_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mfx.MfxError, match=message) as caught:
        mfx.momentumize(Net(), **options)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "block.0"}, r"include='block\.0' matches no block; near names: 'blocks\.\d'"),
        ({"exclude": ["blocks.0", "blocks.7"]}, r"exclude='blocks\.7' matches no block; near names: 'blocks\.\d'"),
        ({"gamma": {"blocks.9": 0.5}}, r"gamma='blocks\.9' matches no block; near names: 'blocks\.\d'"),
        ({"modules": "block.0"}, r"modules='block\.0' matches no module; near names: .*'blocks\.0'"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_names(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mfx.OptionError, match=message):
        mfx.momentumize(Net(), **options)


@pytest.mark.parametrize("model", [lambda x: x, Net, None, "resnet18"])
def test_what_is_no_module(model: Any) -> None:
    with pytest.raises(mfx.InputTypeError, match=r"model must be a torch\.nn\.Module, not"):
        mfx.momentumize(model)


def test_a_model_that_is_momentumized_already() -> None:
    with pytest.raises(mfx.OptionError, match=r"momentumized already: .* mfx\.set_gamma"):
        mfx.momentumize(mfx.momentumize(Net()))


def test_gamma_of_a_plain_model_cannot_be_set() -> None:
    with pytest.raises(mfx.InputTypeError, match=r"not a momentumized model: call mfx\.momentumize"):
        mfx.set_gamma(Net(), 0.5)


def test_a_new_gamma_may_not_drop_a_block() -> None:
    mm = mfx.momentumize(Net())
    with pytest.raises(mfx.OptionError, match=r"gives no value to blocks \['blocks\.1', 'blocks\.2'\]"):
        mfx.set_gamma(mm, {"blocks.0": 0.5})


@pytest.mark.parametrize("examples", [3, "x"])
def test_example_inputs_of_a_wrong_type(examples: Any) -> None:
    with pytest.raises(mfx.InputTypeError, match="example_inputs must be a tensor, a tuple of positional arguments"):
        mfx.momentumize(Net(), example_inputs=examples)


class Growing(nn.Module):
    """Adds a column to a row: the sum is a matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


@pytest.mark.parametrize("reversible", [True, False])
def test_shapes_that_do_not_match_at_run_time_name_the_block(reversible: bool) -> None:
    mm = mfx.momentumize(Net(block=Growing), reversible=reversible)
    with pytest.raises(mfx.ShapeError, match=r"block 'blocks\.0'.*\(5, 1\).*\(5, 6\).*example_inputs=.*exclude="):
        mm(rows())


def test_with_example_inputs_an_add_that_broadcasts_is_kept() -> None:
    with pytest.warns(mfx.NothingRewrittenWarning, match="has another shape than x"):
        mm = mfx.momentumize(Net(block=Growing), example_inputs=rows())
    mm(rows())


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return super().forward(x)


class Drawing(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else super().forward(x)


class Remembering(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class Counting(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Branching, r"stopped in module 'blocks\.0' \(Branching\) at\n.*test_conversion\.py:\d+: if x\.sum\(\) > 0"),
        (Drawing, "draws from Python's or NumPy's random module"),
        (Remembering, r"Remembering\.forward of module 'blocks\.0' sets self\.last"),
        (Counting, r"Counting\.forward of module 'blocks\.0' sets self\.calls"),
    ],
)
def test_a_forward_that_cannot_be_captured_says_where_and_what_to_do(block: Any, message: str) -> None:
    model = Net(block=block)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(mfx.CaptureError, match=message) as caught:
        mfx.momentumize(model, capture="fx")
    assert "modules=" in str(caught.value)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("block", [Branching, Counting])
def test_the_remedy_that_the_error_names_works(block: Any) -> None:
    model = Net(block=block, p=0.0)
    mm = mfx.momentumize(model, 0.0, modules="blocks.?")
    x = rows()
    assert torch.allclose(mm(x), model(x))


def test_a_forward_set_on_the_instance() -> None:
    model = Net()
    model.forward = lambda x: x
    with pytest.raises(mfx.InputTypeError, match=r"forward of its own on the instance"):
        mfx.momentumize(model)


def test_a_forward_set_on_an_inner_instance_is_followed_or_refused() -> None:
    model = Net(p=0.0)
    model.blocks[1].forward = lambda x: x * 2
    x = rows()
    assert torch.allclose(mfx.momentumize(model, 0.0)(x), model(x))
