"""Direct: graphs that Dynamo has made and cannot follow again, given to the backend as they are.

Dynamo follows no ``autograd_function_apply``, which is what it makes of a custom ``torch.autograd.Function``.  Such a
graph is compiled once for each kind of inputs (sizes, dtypes, modes) that it meets, for it is not guarded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx.run.conditions import Autocast
from mfx.torch_versions import HigherOrderOperator, dynamo


def is_followed_again(graph: fx.Graph) -> bool:
    """Whether Dynamo can follow what ``graph`` holds."""
    names = (node.target.name() for node in graph.nodes if isinstance(node.target, HigherOrderOperator))
    return "autograd_function_apply" not in names


class Direct:
    """The function of a graph that takes the root first, compiled by ``backend`` for each kind of inputs."""

    def __init__(self, graph: fx.Graph, backend: Any) -> None:
        self.graph = fx.Graph()
        root, *_ = graph.find_nodes(op="placeholder")
        env: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node is not root:
                env[node] = self.graph.node_copy(node, env.__getitem__)
        self.backend = backend
        self.made: dict[Any, Any] = {}

    def __call__(self, root: nn.Module, *inputs: Any) -> Any:
        key = tuple(map(_kind, inputs)), torch.is_grad_enabled(), Autocast.current(_device(inputs))
        if key not in self.made:
            compile_by = dynamo().lookup_backend(self.backend)
            self.made[key] = compile_by(fx.GraphModule(root, self.graph), list(inputs))
        return self.made[key](*inputs)


def _kind(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.dtype, value.shape, value.stride(), value.device, value.requires_grad


def _device(inputs: tuple[Any, ...]) -> torch.device:
    return next((value.device for value in inputs if isinstance(value, Tensor)), torch.device("cpu"))
