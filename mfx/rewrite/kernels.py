"""Kernels: the arithmetic of a state, compiled: each in one pass over memory.

They are compiled for any number of elements, and given tensors of one layout as what lies in memory, so that chains of
all shapes share them.  They give the bits of the eager ones, since a state may go forward by one and backward by the
other: so on the CPU alone, where inductor contracts nothing.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mfx.rule.arithmetic.carry import EAGER, Kernels

_made: WeakValueDictionary[int, Kernels] = WeakValueDictionary()
"""Those in use, by the id of their backend, which they keep."""


def fused(backend: str | Callable[..., Any]) -> Kernels:
    """The kernels, compiled by ``backend``."""
    kernels = _made.get(id(backend))
    if kernels is None:
        made = (_compiled(kernel, backend) for kernel in (EAGER.forward, EAGER.x_before, EAGER.w_before))
        kernels = _made[id(backend)] = Kernels(*made)
    return kernels


def _compiled(kernel: Any, backend: Any) -> Callable[..., Any]:
    # Code of its own for each backend: that is what compiled variants are counted by.
    own = types.FunctionType(kernel.__code__.replace(), kernel.__globals__, kernel.__name__, kernel.__defaults__)
    compiled = torch.compile(own, backend=backend, dynamic=True)

    def run(*given: Any) -> Any:
        states = [value for value in given if isinstance(value, Tensor) and value.dim() > 0]
        like = states[0]
        flat = all(value.shape == like.shape and value.stride() == like.stride() for value in states)
        # Elsewhere a product and a sum may become one operation, that rounds once, in one kernel and not in another.
        if not (flat and like.device.type == "cpu" and _is_dense(like)):
            return kernel(*given)
        values = compiled(*(_argument(value, like) for value in given))
        if isinstance(values, Tensor):
            return values.as_strided(like.shape, like.stride())
        return tuple(value.as_strided(like.shape, like.stride()) for value in values)

    return run


def _argument(value: Any, like: Tensor) -> Any:
    if type(value) is float:
        return _number(value)
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.as_strided((like.numel(),), (1,))
    return value


@functools.lru_cache(maxsize=4096)
def _number(value: float) -> Tensor:
    """A number that compiled code takes for one that may change."""
    return torch.tensor(value, dtype=torch.float64)


def _is_dense(value: Tensor) -> bool:
    """Whether the values fill their memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return value.layout == torch.strided
