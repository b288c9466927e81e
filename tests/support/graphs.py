"""Small networks from single functions, and what the pass finds in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfx.find import Found
from mfx.model.outlook import outlooks
from mfx.options import make_options
from mfx.pipeline import Passed

X = torch.ones(2, 4, dtype=torch.float64)
"""An example input."""


class Part(nn.Module):
    """A module with the given forward, three linear layers ``f``, ``g``, ``h`` of width 4, and ``parts``."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name in "fgh":
            self.add_module(name, nn.Linear(4, 4))
        for name, part in parts.items():
            buffer = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            (self.register_buffer if buffer else partial(setattr, self))(name, part)
        self.body = forward

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A :class:`Part` to use as a root, in float64: its class has the given forward, with its signature."""
    return type("Net", (Part,), {"forward": forward})(forward, **parts).double()


def prepared(model: nn.Module, example_inputs: Any = None, **options: Any) -> Passed:
    """The model captured, searched, planned and rewritten, with the options of ``momentumize``."""
    return outlooks(model, make_options(**options), example_inputs)[""].entry.passed


def found(forward: Callable[..., Any], parts: dict[str, Any], example: Any = None, **options: Any) -> Found:
    """What the finder says of a :func:`net`."""
    return prepared(net(forward, **parts), example, **options).found


def only_block(forward: Callable[..., Any], parts: dict[str, Any], example: Any = None, **options: Any) -> Any:
    """The one block of a :func:`net`, where nothing is rejected."""
    result = found(forward, parts, example, **options)
    assert not result.rejections
    (block,) = result.blocks
    return block


def case(meaning: str, forward: Callable[..., Any], *expected: Any, **parts: Any) -> Any:
    """A parametrized case: a forward, what is expected of it, and the network's parts."""
    return pytest.param(forward, *expected, parts, id=meaning)
