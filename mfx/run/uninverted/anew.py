"""Anew: a compiled segment, run a second time in backward, and differentiated there.

What compiled code saves is its own affair, so nothing of the first run is kept but its inputs: all that it computes
with is among them.

Known limits: first derivatives only; double backward raises (M8).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from mfx.errors import BackwardError
from mfx.run.recompute import as_inner, saved_tensors
from mfx.torch_versions import not_followed


class Anew(torch.autograd.Function):
    """``inputs -> first(inputs)``, with the gradients of ``again``, another run of the same."""

    @staticmethod
    def forward(
        ctx: Any, name: str, first: Callable[..., Any], again: Callable[..., Any], *inputs: Any
    ) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.name, ctx.again = name, again
        saved = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*compress(inputs, saved))
        ctx.constants = [None if there else (value,) for value, there in zip(inputs, saved, strict=True)]
        with torch.enable_grad():
            values = first(*map(_entering, inputs))
        given = tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
        constant = [isinstance(value, Tensor) and not value.requires_grad for value in values]
        ctx.mark_non_differentiable(*compress(given, constant))
        return given

    @staticmethod
    @not_followed
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise BackwardError(
                f"{ctx.name}: create_graph=True (double backward) is not supported by what is compiled. Without "
                "torch.compile segments can be differentiated any number of times"
            )
        saved = iter(saved_tensors(ctx, f"an input of {ctx.name}"))
        leaves = [_leaf(next(saved)) if held is None else held[0] for held in ctx.constants]
        with torch.enable_grad():
            values = ctx.again(*map(as_inner, leaves))
        pairs = [(value, grad) for value, grad in zip(values, grads, strict=True) if grad is not None]
        asked = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        ends, given = [value for value, _ in pairs], [grad for _, grad in pairs]
        del values, pairs
        found = iter(torch.autograd.grad(ends, asked, given, allow_unused=True) if ends else [None] * len(asked))
        return (
            None,
            None,
            None,
            *(next(found) if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves),
        )


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _entering(value: Any) -> Any:
    return as_inner(_leaf(value)) if isinstance(value, Tensor) else value
