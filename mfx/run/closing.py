"""Closing: the autograd node through which all values of a segment of a chain leave, and at which its backward starts.

Under a compiler, which would compute what forward and backward have in common once and keep it, snapshots are kept as
*twins*: their bits as whole numbers, one of them turned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfx.errors import BackwardError
from mfx.run.chain import ChainSpec
from mfx.run.conditions import compiling
from mfx.run.detector import size_of
from mfx.run.recompute import saved_tensors
from mfx.run.tape import Left, Recorder, Rewind, Setting, Slot


class Close(torch.autograd.Function):
    """``(x, v, escapes, held) -> (x in the model's dtype, v, escapes, held)``; saves the end state, v_0, the snapshots.

    ``held`` are the tensors that hooks or modules kept.  They leave as they are, the same objects, with this node as
    their history: autograd takes them for changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        setting: Setting,
        recorder: Recorder,
        slot: Slot,
        start: Tensor | None,
        x: Tensor,
        v: Tensor,
        held: int,
        *values: Any,
    ) -> Any:
        ctx.set_materialize_grads(False)
        kept = [tensor for pair in recorder.snapshots.values() for tensor in pair if tensor is not None]
        kept = list(map(_twin_of, kept)) if compiling(x) else kept
        inverts = recorder.end - 1 not in setting.plan.snapshots
        once = [tensor for tensor in (start, recorder.zeros) if tensor is not None]
        ctx.save_for_backward(*([x, v] if inverts else []), *once, *kept)
        size = None if inverts or compiling(x) else size_of(x)
        ctx.slot, ctx.dtype = slot, x.dtype
        ctx.left = Left.of(setting, recorder, start is not None, size)
        recorder.snapshots, recorder.zeros = {}, None
        last = recorder.end == len(setting.chain.steps)
        escapes, kept = values[: len(values) - held], values[len(values) - held :]
        ctx.mark_dirty(*kept)
        return (*map(_alias, (x.to(recorder.dtype), None if last else v, *escapes)), *kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        left: Left = ctx.left
        chain = left.setting.chain
        refuse_double_backward(chain)
        saved = iter(saved_tensors(ctx, f"an output of {chain.name}, or a value it keeps,"))
        end = (next(saved), next(saved)) if left.inverts_last else None
        start, zeros = (next(saved) if there else None for there in (left.starts, left.counts))
        kept = (value if value.is_floating_point() else _of_twin(value, ctx.dtype) for value in saved)
        snapshots = {index: (next(kept), next(kept) if both else None) for index, both in left.layout}
        ctx.slot.rewind = Rewind(left, end, start, snapshots, zeros)
        grad_x, grad_v, *others = grads
        return None, None, None, None, grad_x, grad_v, None, *others


def refuse_double_backward(chain: ChainSpec) -> None:
    """Raise where a graph of the backward is asked for (M8)."""
    if torch.is_grad_enabled():
        raise BackwardError(
            f"{chain.name}: create_graph=True (double backward) is not supported by the reversible run. "
            "Use reversible=False, which stores activations and can be differentiated any number of times"
        )


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _twin_of(value: Tensor) -> Tensor:
    """The bits of ``value``, one of them turned, as whole numbers."""
    return value.view(_BITS[value.element_size()]) ^ 1


def _of_twin(twin: Tensor, dtype: torch.dtype) -> Tensor:
    """The value of a twin."""
    return (twin ^ 1).view(dtype)
