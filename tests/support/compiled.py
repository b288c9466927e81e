"""What the tests of compiled models share: the graphs that were rewritten and compiled, and gradients of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

handed: list[Any] = []
"""What :func:`recording` was given to compile."""
driven: list[Any] = []
"""The rewritten graphs, with their chains, that compiled pieces were made of."""


def recording(gm: Any, example_inputs: Any) -> Any:
    """A backend that keeps the graph it is given and runs it."""
    handed.append(gm)
    return gm.forward


def computing(name: str) -> int:
    """How many of the compiled graphs have an operation of this name."""
    return sum(any(name in str(node.target) for node in gm.graph.nodes) for gm in handed)


def gradients(call: Any, model: nn.Module, *inputs: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Output and gradients of inputs and parameters of one step."""
    y = call(*inputs)
    wanted = [*(x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad), *model.parameters()]
    return y.detach(), torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)


def chains(gm: Any) -> list[str]:
    """The names of the chain nodes of a graph."""
    return [node.target.__name__ for node in gm.graph.nodes if node.name.startswith("momentum")]


def segments(gm: Any) -> list[str]:
    """The names of the segment nodes of a graph."""
    return [node.target.__name__ for node in gm.graph.nodes if node.name.startswith("segment")]
