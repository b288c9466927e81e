"""Random operations that a compiler traces: the same values whenever a branch runs.

A compiler traces the recomputation of a branch as further operations, so no generator can be rewound: a plain
dropout there would draw a new mask, and the gradients would be wrong in silence.  While one traces,

1. :class:`Counted`, a mode around the branch, takes the place of every random operation it knows and computes the
   values from a seed tensor, the number of the step and that of the call (:mod:`mfx.counter`);
2. Python functions of ``torch.nn.functional`` that would hide their inner calls from a mode
   (``multi_head_attention_forward``, ``gumbel_softmax``) are run as a copy that does not;
3. :class:`Refuse` raises where an operation draws that neither of these saw.

Which operations are known by name, so that a chain with others can be kept stored when planning: :func:`is_known`.
Source: the forms of dropout follow aten/src/ATen/native/Dropout.cpp, attention the documentation of
``scaled_dot_product_attention``.
Known limits: attention with dropout is computed from its definition, without a fused kernel.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mfx.counter import Seed, exponential, keeps, normal, uniform
from mfx.errors import CompileError

_NEGATIVE_SATURATION = -1.7580993408473766  # of selu; what alpha dropout puts in the place of a value
_CALLS = 1 << 20
_KNOWN = frozenset(
    "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_ feature_dropout feature_dropout_ "
    "feature_alpha_dropout feature_alpha_dropout_ scaled_dot_product_attention multi_head_attention_forward "
    "gumbel_softmax rand rand_like randn randn_like bernoulli bernoulli_ uniform_ normal_ exponential_".split()
)


def is_known(name: str) -> bool:
    """Whether the values of the random operation of this plain name can be had again."""
    return name in _KNOWN


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
        handler = _handlers().get(func)
        if handler is not None:
            return handler(self, func, *args, **kwargs)
        inner = _transparent(func)
        if inner is None:
            return func(*args, **kwargs)
        with self:
            return inner(*args, **kwargs)


class Refuse(TorchDispatchMode):
    """Raises where an operation draws from a generator."""

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


def _dropped(mode: Counted, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    if p >= 1:
        return x * 0.0
    kept = keeps(shape, mode.seed, mode.site(), p)
    return torch.where(kept, x * (1 / (1 - p)), torch.zeros((), dtype=x.dtype, device=x.device))


def _dropout(mode: Counted, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
             *, train: bool = True) -> Tensor:  # fmt: skip
    if not (training and train) or p == 0:
        return input
    return _into(input, _dropped(mode, input, p, input.shape), inplace)


def _feature_dropout(unbatched: int | None) -> Callable[..., Tensor]:
    """Whole channels; ``unbatched`` is the number of dimensions of an input without a batch."""

    def dropout(mode: Counted, func: Any, input: Tensor, p: float = 0.5, training: bool = True,
                inplace: bool = False, *, train: bool = True) -> Tensor:  # fmt: skip
        if not (training and train) or p == 0:
            return input
        lead = 1 if input.dim() == unbatched else 2
        return _into(input, _dropped(mode, input, p, _channels(input, lead)), inplace)

    return dropout


def _alpha_dropout(feature: bool) -> Callable[..., Tensor]:
    def dropout(mode: Counted, func: Any, input: Tensor, p: float = 0.5, training: bool = False,
                inplace: bool = False, *, train: bool = False) -> Tensor:  # fmt: skip
        if not (training or train) or p == 0:
            return input
        if p >= 1:
            return _into(input, input * 0.0, inplace)
        a = 1 / math.sqrt((_NEGATIVE_SATURATION**2 * p + 1) * (1 - p))
        b = -_NEGATIVE_SATURATION * a * p
        kept = keeps(_channels(input, 2) if feature else input.shape, mode.seed, mode.site(), p)
        instead = torch.full((), _NEGATIVE_SATURATION * a + b, dtype=input.dtype, device=input.device)
        return _into(input, torch.where(kept, input * a + b, instead), inplace)

    return dropout


def _channels(x: Tensor, lead: int) -> tuple[int, ...]:
    return (*x.shape[:lead], *(1,) * (x.dim() - lead))


def _into(target: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return target.copy_(value) if inplace else value


def _in_place(handler: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The form ``dropout_(input, p, train)``."""
    return lambda mode, func, input, p, train: handler(mode, func, input, p, train, True)


def _attention(mode: Counted, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> Tensor:  # fmt: skip
    if dropout_p == 0:
        return func(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = (query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(seen.logical_not(), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch._safe_softmax(scores, -1)
    return _dropped(mode, weights, dropout_p, weights.shape) @ value


def _bernoulli_(mode: Counted, func: Any, self: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    return self.copy_(_decisions(mode, self, p))


def _bernoulli(mode: Counted, func: Any, input: Tensor, p: Any = None, *, generator: Any = None) -> Tensor:
    return _decisions(mode, input, input if p is None else p).to(input.dtype)


def _decisions(mode: Counted, like: Tensor, p: Any) -> Tensor:
    """True with probability ``p``, a number or a tensor of like's shape."""
    if not isinstance(p, Tensor):
        return keeps(like.shape, mode.seed, mode.site(), 1 - p)
    wide = p.dtype if p.dtype == torch.float64 else torch.float32
    return uniform(like.shape, mode.seed, mode.site(), wide) < p.to(wide)


def _factory(draw: Callable[[Counted, Sequence[int], torch.dtype], Tensor]) -> Callable[..., Tensor]:
    """torch.rand and torch.randn; layout and pinning say nothing about the values."""

    def make(mode: Counted, func: Any, *size: Any, dtype: torch.dtype | None = None, device: Any = None,
             **rest: Any) -> Tensor:  # fmt: skip
        given = rest["size"] if "size" in rest else size[0] if size and isinstance(size[0], (tuple, list)) else size
        return draw(mode, given, dtype or torch.get_default_dtype()).to(device or torch.get_default_device())

    return make


def _like(draw: Callable[[Counted, Sequence[int], torch.dtype], Tensor]) -> Callable[..., Tensor]:
    def make(mode: Counted, func: Any, input: Tensor, *, dtype: torch.dtype | None = None, device: Any = None,
             **rest: Any) -> Tensor:  # fmt: skip
        drawn = draw(mode, input.shape, dtype or input.dtype)
        return drawn if device is None else drawn.to(device)

    return make


def _uniform(mode: Counted, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return uniform(shape, mode.seed, mode.site(), dtype)


def _normal(mode: Counted, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return normal(shape, mode.seed, mode.site(), mode.site()).to(dtype)


def _uniform_(mode: Counted, func: Any, self: Tensor, a: float = 0.0, b: float = 1.0, *, generator: Any = None,
              **named: float) -> Tensor:  # fmt: skip
    a, b = named.get("from", a), named.get("to", b)
    return self.copy_(_uniform(mode, self.shape, self.dtype) * (b - a) + a)


def _normal_(mode: Counted, func: Any, self: Tensor, mean: float = 0.0, std: float = 1.0, *,
             generator: Any = None) -> Tensor:  # fmt: skip
    return self.copy_(_normal(mode, self.shape, torch.float64) * std + mean)


def _exponential_(mode: Counted, func: Any, self: Tensor, lambd: float = 1.0, *, generator: Any = None) -> Tensor:
    return self.copy_(exponential(self.shape, mode.seed, mode.site()) / lambd)


@functools.cache
def _handlers() -> dict[Any, Callable[..., Any]]:
    """What stands for each operation."""
    features, alpha, feature_alpha = _feature_dropout(None), _alpha_dropout(False), _alpha_dropout(True)
    return {
        F.dropout: _dropout,
        F.dropout1d: _feature_dropout(2),
        F.dropout2d: features,
        F.dropout3d: _feature_dropout(4),
        F.alpha_dropout: alpha,
        F.feature_alpha_dropout: feature_alpha,
        F.scaled_dot_product_attention: _attention,
        torch.dropout: _dropout,
        torch.dropout_: _in_place(_dropout),
        torch.feature_dropout: features,
        torch.feature_dropout_: _in_place(features),
        torch.alpha_dropout: alpha,
        torch.alpha_dropout_: _in_place(alpha),
        torch.feature_alpha_dropout: feature_alpha,
        torch.feature_alpha_dropout_: _in_place(feature_alpha),
        torch.bernoulli: _bernoulli,
        torch.Tensor.bernoulli: _bernoulli,
        torch.Tensor.bernoulli_: _bernoulli_,
        torch.rand: _factory(_uniform),
        torch.randn: _factory(_normal),
        torch.rand_like: _like(_uniform),
        torch.randn_like: _like(_normal),
        torch.Tensor.uniform_: _uniform_,
        torch.Tensor.normal_: _normal_,
        torch.Tensor.exponential_: _exponential_,
    }
