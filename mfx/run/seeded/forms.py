"""The forms of random operations, computed from a seed: what :mod:`mfx.run.seeded.random` puts in their place.

Each takes the mode that numbers the calls, the original function, and that function's own arguments.

Source: dropout follows aten/src/ATen/native/Dropout.cpp, attention the documentation of
``scaled_dot_product_attention``.
Known limits: attention with dropout is computed from its definition, without a fused kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mfx.run.seeded.counter import Seed, exponential, keeps, normal, uniform
from mfx.torch_versions import safe_softmax

_NEGATIVE_SATURATION = -1.7580993408473766  # of selu; what alpha dropout puts in the place of a value


class Sites(Protocol):
    """Gives the seed, and a number for each call."""

    seed: Seed

    def site(self) -> int: ...


def _dropped(mode: Sites, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
    if p >= 1:
        return x * 0.0
    kept = keeps(shape, mode.seed, mode.site(), p)
    return torch.where(kept, x * (1 / (1 - p)), torch.zeros((), dtype=x.dtype, device=x.device))


def _dropout(mode: Sites, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False,
             *, train: bool = True) -> Tensor:  # fmt: skip
    if not (training and train) or p == 0:
        return input
    return _into(input, _dropped(mode, input, p, input.shape), inplace)


def _feature_dropout(unbatched: int | None) -> Callable[..., Tensor]:
    """Whole channels; ``unbatched`` is the number of dimensions of an input without a batch."""

    def dropout(mode: Sites, func: Any, input: Tensor, p: float = 0.5, training: bool = True,
                inplace: bool = False, *, train: bool = True) -> Tensor:  # fmt: skip
        if not (training and train) or p == 0:
            return input
        lead = 1 if input.dim() == unbatched else 2
        return _into(input, _dropped(mode, input, p, _channels(input, lead)), inplace)

    return dropout


def _alpha_dropout(feature: bool) -> Callable[..., Tensor]:
    def dropout(mode: Sites, func: Any, input: Tensor, p: float = 0.5, training: bool = False,
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


def _attention(mode: Sites, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
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
    weights = safe_softmax(scores)
    return _dropped(mode, weights, dropout_p, weights.shape) @ value


def _bernoulli_(mode: Sites, func: Any, self: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    return self.copy_(_decisions(mode, self, p))


def _bernoulli(mode: Sites, func: Any, input: Tensor, p: Any = None, *, generator: Any = None) -> Tensor:
    return _decisions(mode, input, input if p is None else p).to(input.dtype)


def _decisions(mode: Sites, like: Tensor, p: Any) -> Tensor:
    """True with probability ``p``, a number or a tensor of like's shape."""
    if not isinstance(p, Tensor):
        return keeps(like.shape, mode.seed, mode.site(), 1 - p)
    wide = p.dtype if p.dtype == torch.float64 else torch.float32
    return uniform(like.shape, mode.seed, mode.site(), wide) < p.to(wide)


def _factory(draw: Callable[[Sites, Sequence[int], torch.dtype], Tensor]) -> Callable[..., Tensor]:
    """torch.rand and torch.randn; layout and pinning say nothing about the values."""

    def make(mode: Sites, func: Any, *size: Any, dtype: torch.dtype | None = None, device: Any = None,
             **rest: Any) -> Tensor:  # fmt: skip
        given = rest["size"] if "size" in rest else size[0] if size and isinstance(size[0], (tuple, list)) else size
        return draw(mode, given, dtype or torch.get_default_dtype()).to(device or torch.get_default_device())

    return make


def _like(draw: Callable[[Sites, Sequence[int], torch.dtype], Tensor]) -> Callable[..., Tensor]:
    def make(mode: Sites, func: Any, input: Tensor, *, dtype: torch.dtype | None = None, device: Any = None,
             **rest: Any) -> Tensor:  # fmt: skip
        drawn = draw(mode, input.shape, dtype or input.dtype)
        return drawn if device is None else drawn.to(device)

    return make


def _uniform(mode: Sites, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return uniform(shape, mode.seed, mode.site(), dtype)


def _normal(mode: Sites, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return normal(shape, mode.seed, mode.site(), mode.site()).to(dtype)


def _uniform_(mode: Sites, func: Any, self: Tensor, a: float = 0.0, b: float = 1.0, *, generator: Any = None,
              **named: float) -> Tensor:  # fmt: skip
    a, b = named.get("from", a), named.get("to", b)
    return self.copy_(_uniform(mode, self.shape, self.dtype) * (b - a) + a)


def _normal_(mode: Sites, func: Any, self: Tensor, mean: float = 0.0, std: float = 1.0, *,
             generator: Any = None) -> Tensor:  # fmt: skip
    return self.copy_(_normal(mode, self.shape, torch.float64) * std + mean)


def _exponential_(mode: Sites, func: Any, self: Tensor, lambd: float = 1.0, *, generator: Any = None) -> Tensor:
    return self.copy_(exponential(self.shape, mode.seed, mode.site()) / lambd)


@functools.cache
def handlers() -> dict[Any, Callable[..., Any]]:
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
