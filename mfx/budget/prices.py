"""Prices: what each node of a graph keeps, weighs and costs, from one run on fake tensors.

Work is that of matrix products and convolutions by torch's own formulas, and for every operation the bytes that it
reads and writes, at :data:`FLOPS_A_BYTE`: most of a network's operations wait for memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import flop_registry

from mfx.graph.shapes import Fake, Interpreter
from mfx.memory import KeptBytes
from mfx.plan.segments import Prices
from mfx.torch_versions import TorchDispatchMode, pytree

FLOPS_A_BYTE = 32
"""How many FLOPs a device does while it moves a byte; between those of CPUs (some 10) and accelerators (100)."""


def prices_of(graph: fx.Graph, root: nn.Module, inputs: Sequence[Any]) -> Prices:
    """The prices of the nodes of ``graph``, by root, for ``inputs``."""
    fake = Fake(root, list(inputs))
    with fake(), torch.enable_grad():
        tensors = [value for value in fake.tensors if isinstance(value, Tensor)]
        with KeptBytes([*root.parameters(), *root.buffers(), *tensors]) as kept, _Work() as work:
            run = _Pricing(graph, root, kept, work)
            output = run.run(*fake.tensors)
        saved = {node: size for node, size in kept.by_owner().items() if isinstance(node, fx.Node)}
        del output
    return Prices(saved, run.sizes, work.done, frozenset(run.containers))


class _Pricing(Interpreter):
    """Tells the counters which node runs, and notes what its value weighs."""

    def __init__(self, graph: fx.Graph, root: nn.Module, kept: KeptBytes, work: _Work) -> None:
        super().__init__(graph, root)
        self.kept = kept
        self.work = work
        self.sizes: dict[fx.Node, int] = {}
        self.containers: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        self.kept.owner = self.work.owner = n
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.sizes[n] = value.untyped_storage().nbytes()
        elif any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            self.containers.add(n)
        return value


class _Work(TorchDispatchMode):
    """Adds up, for the owner of the moment, the work of the operations in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.owner: fx.Node | None = None
        self.done: dict[fx.Node, float] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.owner is not None and not func.is_view:
            values = pytree.tree_leaves((args, kwargs, result))
            moved = sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count is not None else 0
            self.done[self.owner] = self.done.get(self.owner, 0.0) + flops + FLOPS_A_BYTE * moved
        return result
