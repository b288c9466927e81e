"""Standing: tensors in the place of those that autograd cannot give another history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StandIn(torch.autograd.Function):
    """The same values in the same memory, as a tensor that is no view."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.new_empty(0).set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def stand_in(value: Tensor) -> Tensor:
    """A tensor in the place of this one that autograd can give another history; itself, if it is of a special kind."""
    plain = type(value) is Tensor and value.layout == torch.strided and not value.is_quantized
    return StandIn.apply(value) if plain else value  # type: ignore[return-value]
