"""Shapes: what each node of a captured graph has, without computing any values.

The graph is interpreted on fake tensors (:mod:`torch._subclasses.fake_tensor`), which know shape, dtype and
device and hold no memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mfx.dataflow import SHAPE


def fake_mode_of(tensors: list[torch.Tensor]) -> FakeTensorMode:
    """The mode of the given fake tensors, or a new one."""
    for tensor in tensors:
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def to_fake(tensors: list[torch.Tensor], mode: FakeTensorMode, device: torch.device) -> list[torch.Tensor]:
    """The tensors without memory; those on the meta device are taken to be on ``device``."""
    return [_to_fake(tensor, mode, device) for tensor in tensors]


def _to_fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    if not tensor.is_meta:
        return mode.from_tensor(tensor.detach(), static_shapes=True)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


class _Shapes(fx.Interpreter):
    """Runs the graph node by node, noting each value's shape."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        holder = nn.Module()
        super().__init__(holder, graph=graph)
        self.model = root

    def fetch_attr(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        return getattr(self.model.get_submodule(owner), name)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model.get_submodule(target)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta[SHAPE] = tuple(value.shape)
            if n.op == "call_method" and n.target == "to":
                source = self.env.get(n.all_input_nodes[0]) if n.all_input_nodes else None
                n.meta["dtype_kept"] = isinstance(source, torch.Tensor) and source.dtype == value.dtype
        return value


def propagate_shapes(graph: fx.Graph, root: nn.Module, tensors: list[torch.Tensor]) -> None:
    """Note the shape of every node's value in its meta, for inputs like ``tensors``."""
    mode = fake_mode_of(tensors)
    device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
    with mode, torch.no_grad(), torch.random.fork_rng(devices=[]):
        _Shapes(graph, root).run(*to_fake(tensors, mode, device))
