"""Random operations that a compiler traces: the same values whenever a branch runs.

A compiler traces the recomputation of a branch as further operations, so no generator can be rewound: a plain
dropout there would draw a new mask, and the gradients would be wrong in silence.  While one traces,

1. :class:`Counted`, a mode around the branch, takes the place of every random operation it knows
   (:mod:`mfx.run.seeded.forms`) and computes the values from a seed, the number of the step and that of the call
   (:mod:`mfx.run.seeded.counter`);
2. Python functions of ``torch.nn.functional`` that would hide their inner calls from a mode
   (``multi_head_attention_forward``, ``gumbel_softmax``) are run as a copy that does not;
3. :class:`Refuse` raises where an operation draws that neither of these saw.

Which operations are known, so that a chain with others is planned to be stored: :data:`mfx.graph.draws.RANDOM`.
Source: the idea of running copies is this module's own; which functions need one, torch/nn/functional.py.
Known limits: random functions of other libraries than torch are opaque, unless they call torch's.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from mfx.errors import CompileError
from mfx.run.seeded.counter import Seed
from mfx.run.seeded.forms import handlers
from mfx.torch_versions import TorchDispatchMode

_CALLS = 1 << 20


@contextlib.contextmanager
def counted(seed: Seed | None, step: int, block: str) -> Iterator[None]:
    """Around a branch that a compiler traces, in both of its runs.

    Args:
        seed: None where the branch draws nothing.
        step: the step's number in its chain.
        block: the block's name, for error messages.

    Raises:
        CompileError: an operation draws that cannot be repeated.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(Refuse(block))
        if seed is not None:
            stack.enter_context(Counted(seed, step))
        yield


class Counted(TorchFunctionMode):
    """Computes random operations from a seed; sites are numbered in order of the calls."""

    def __init__(self, seed: Seed, step: int) -> None:
        super().__init__()
        self.seed = seed
        self.next = step * _CALLS

    def site(self) -> int:
        """The number of the next call."""
        self.next += 1
        return self.next - 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = handlers().get(func)
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        inner = _transparent(func)
        if inner is None:
            return func(*args, **kwargs)
        with self:
            return inner(*args, **kwargs)


class Refuse(TorchDispatchMode):
    """Raises where an operation draws from a generator."""

    # Read by torch: a mode without it is not let through operations that hold graphs (flex attention, checkpoint).
    supports_higher_order_operators = True

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block = block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()) and _draws(func, args, kwargs):
            raise CompileError(
                f"block {self.block!r}: {func} draws random numbers, and under a compiler its draw cannot be repeated "
                f"when the branch is recomputed. Keep the block as it is with exclude={self.block!r}, store "
                "activations with reversible=False, or compile nothing"
            )
        return func(*args, **kwargs)


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an operation that can draw does; attention and dropout say how much they drop."""
    if func._schema.name == "aten::_fused_sdp_choice":
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "train", "training"):
            value = kwargs.get(argument.name, args[position] if position < len(args) else argument.default_value)
            if not value:
                return False
    return True


@functools.cache
def _transparent(func: Any) -> Callable[..., Any] | None:
    """A Python function of torch.nn.functional that does not hand itself, as a whole, to modes."""
    if not isinstance(func, types.FunctionType) or func.__module__ != F.__name__:
        return None
    scope = dict(func.__globals__)
    scope.update({name: lambda *tensors: False for name in scope if name.startswith("has_torch_function")})
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
