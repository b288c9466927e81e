"""Aside: a capture by Dynamo within ``torch.export`` (``strict=False``), which runs the model on fake tensors.

1. The export's own modes are put aside, and Dynamo follows a call with stand-ins: tensors of the sizes in the example,
   of which those that may vary are marked so.
2. What Dynamo takes for granted about such sizes (a branch of the model's Python that it took) is asked of the
   export's own sizes when the graph runs, so that the exported program has it among its constraints.

The graph then runs on the export's fake tensors, as it does on any others.

Known limits: a number that may vary is taken as the one of the example, which is then a constraint, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mfx.capture.call import Call
from mfx.torch_versions import dynamo, each_size_apart, evaluated, pytree, without_modes, without_recorders


def is_exporting() -> bool:
    """Whether ``torch.export`` records what runs."""
    return torch.compiler.is_exporting()


@contextlib.contextmanager
def beside_export(call: Call) -> Iterator[Call]:
    """While an export records: not recorded, and with a call of tensors that have values; else ``call`` itself."""
    if not is_exporting():
        yield call
        return
    with without_modes(), without_recorders(), each_size_apart():
        yield Call(*pytree.tree_map(_stand_in, (call.args, call.kwargs)))


def _stand_in(leaf: Any) -> Any:
    if isinstance(leaf, torch.SymInt):
        return int(leaf)
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape, strides = ([_example(size) for size in sizes] for sizes in (leaf.shape, leaf.stride()))
    twin = torch.empty_strided(shape, strides, dtype=leaf.dtype, device=leaf.device).zero_()
    for dim, size in enumerate(leaf.shape):
        if isinstance(size, torch.SymInt):
            dynamo().mark_dynamic(twin, dim)
    return twin.requires_grad_(leaf.requires_grad)


def _example(size: int | torch.SymInt) -> int:
    """The size in the export's example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes of a graph's inputs, and what Dynamo took for granted about them."""

    inputs: tuple[Any, ...]
    known: Any

    @staticmethod
    def of(placeholders: Sequence[fx.Node], known: Any) -> Sizes:
        """Those of Dynamo's graph; ``known`` is its shape environment."""
        return Sizes(tuple(node.meta.get("example_value") for node in placeholders), known)

    def require(self, values: Sequence[Any]) -> None:
        """Ask of the sizes of ``values``, the graph's inputs now, what was taken for granted.

        An export notes each answer as a constraint, and raises where it contradicts what the caller said may vary.
        """
        if self.known is None:
            return
        symbols: dict[Any, Any] = {}
        for mine, theirs in zip(self.inputs, values, strict=True):
            for size, actual in zip(_sizes(mine), _sizes(theirs), strict=True):
                if isinstance(size, torch.SymInt):
                    symbols.setdefault(size.node.expr, actual)
        for taken in self.known.guards:
            if taken.expr.free_symbols <= set(symbols):
                assert evaluated(taken.expr, symbols)


def _sizes(value: Any) -> Sequence[Any]:
    return value.shape if isinstance(value, torch.Tensor) else [value]
