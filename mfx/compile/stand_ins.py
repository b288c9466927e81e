"""Stand-ins: fake tensors for the inputs of a compiler's graph, by which a budget of bytes is planned.

Sizes that are symbolic are taken as they are in the traced call.  Parameters have gradients already, as from the second
step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mfx.graph.notes import LIFTED
from mfx.torch_versions import FakeTensorMode, is_lifted_number, without_modes


def stand_ins(graph: fx.Graph, values: Sequence[Any]) -> list[Any]:
    """What a graph takes, given real or symbolic ``values`` of its placeholders, as tensors of known sizes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    placeholders = graph.find_nodes(op="placeholder")
    with without_modes():
        return [_stand_in(mode, node, value) for node, value in zip(placeholders, values, strict=True)]


def _stand_in(mode: Any, node: fx.Node, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return _known(value)
    if is_lifted_number(node):
        # An item() follows, whose value is known.
        numbers = [_known(user.meta.get("example_value")) for user in node.users]
        with mode:
            return torch.tensor(next(one for one in numbers if isinstance(one, float)), dtype=value.dtype)
    shape, strides = [_known(size) for size in value.shape], [_known(stride) for stride in value.stride()]
    with mode, torch.enable_grad():
        fake = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        fake.requires_grad_(value.requires_grad)
        if node.meta.get(LIFTED) == "parameter" and value.requires_grad:
            fake.grad = torch.zeros_like(fake)
    return fake


def _known(number: Any) -> Any:
    """A number as it is in the traced call: to ask a symbolic one would add guards."""
    hint = getattr(getattr(number, "node", None), "hint", None)
    return number if hint is None else hint
