"""Added: what gives v_0 and gamma, where a compiler has its parameters and buffers as inputs of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from mfx.compile.live import Traceable
from mfx.rewrite import Added


def added_of(momentum: Traceable, root: nn.Module, inputs: Sequence[fx.Node]) -> dict[str, list[Added]]:
    """For each chain its module, with the graph's ``inputs`` for its parameters and buffers."""
    nodes = iter(inputs)
    added: dict[str, list[Added]] = {}
    for kind, modules in momentum.added(root).items():
        for module in modules:
            names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
            added.setdefault(kind, []).append((_called(module, names), tuple(next(nodes) for _ in names)))
    return added


def _called(module: nn.Module, names: Sequence[str]) -> Callable[..., Any]:
    def added(x: Any, *tensors: Any) -> Any:
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x,))

    added.__module__ = "mfx"
    return added
