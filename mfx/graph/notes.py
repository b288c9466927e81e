"""Notes: everything that mfx writes on other people's objects, with its meaning.

A capture owes its graph the notes of the first group on every node, those of the second where they apply.  Whoever
reads a graph reads notes, and asks no capture.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

SCOPE = "mfx_scope"
"""On every node: the :class:`Scope` in which it ran."""

MODES = "mfx_modes"
"""On every node: the :class:`Modes` that it runs under; on the output, those in which the graph is entered and left.
Nodes that switch modes stand for nothing then.  Where a compiler's graph switches other modes, no node has the note."""
FRAMES = "mfx_frames"
"""On every node: the Python functions that it ran in, from the model's forward inwards, each as (file, name)."""

RETURNED = "mfx_returned"
"""Where a module call ended in the value: the set of scopes whose forward returned it."""
ENTERED = "mfx_entered"
"""Where a module call began with the value, as its first: the set of scopes whose forward took it."""
SHAPE = "mfx_shape"
"""Where shapes are known: the shape of the value."""
DTYPE = "mfx_dtype"
"""Where shapes are known: the dtype of the value."""
DTYPE_KEPT = "mfx_dtype_kept"
"""On a cast, where dtypes are known: whether it leaves the dtype as it is."""
STREAMS = "mfx_streams"
"""On a state that several streams are joined in: the node of each in the captured graph."""
ORIGINAL = "mfx_original"
"""In a graph with joined streams, on a node of the captured graph: that node."""
LIFTED = "mfx_lifted"
"""On a placeholder that is no input of the model: ``"parameter"``, ``"buffer"`` or ``"number"``."""
TAKEN = "mfx_taken"
"""The numbers of the calls of named modules that take this value as x."""
GIVEN = "mfx_given"
"""Number and module path of the call of a named module that gives this value."""
NUMBER = "mfx_number"
"""While tracing: whether the value is a size, a number of the call, or what Python computes from such."""
REGION = "mfx_region"
"""In a compiler's graph: the number of the momentumized model that the node belongs to."""

STATE = "_mfx"
"""Attribute of a module: its momentum side (:mod:`mfx.model.parts`); such a module is always taken whole."""
LINKS = "_mfx_links"
"""Attribute of a module whose own Python links the parts in it (:mod:`mfx.model.linked`): what they have in common."""
GUARD = "_mfx_guard"
"""Attribute of the class of a module inside of a captured part: what it runs a part of (:mod:`mfx.model.inner`)."""
VELOCITY, GAMMA = "momentum_velocity", "momentum_gamma"
ADDED = (VELOCITY, GAMMA)
"""The children that a momentumized model may have beyond the original's: what gives velocities, and gammas."""


@dataclass(frozen=True)
class Scope:
    """One call of one module: its path, and how many calls of it came before."""

    path: str
    call: int


Switch = tuple["bool | None", "bool | None", tuple[tuple[str, bool, torch.dtype], ...]]
"""Grad mode, inference mode and autocast (device type, enabled, dtype) to be set; None for what stays."""


@dataclass(frozen=True)
class Modes:
    """What an operation runs under, beside its inputs: the modes that a forward may switch for a part of itself."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype | None], ...]

    @staticmethod
    def current() -> Modes:
        """Those in force now; the dtype of an autocast that is off does not matter."""
        on = [(kind, torch.is_autocast_enabled(kind)) for kind in _device_types()]
        autocast = tuple((kind, is_on, torch.get_autocast_dtype(kind) if is_on else None) for kind, is_on in on)
        return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    def switch(self, base: Modes) -> Switch:
        """What is to be set to come here from ``base``."""
        inference = None if self.inference == base.inference else self.inference
        grad = None if self.grad == base.grad and inference is None else self.grad
        other = [mine for mine, theirs in zip(self.autocast, base.autocast, strict=True) if mine != theirs]
        autocast = tuple((kind, is_on, dtype or torch.get_autocast_dtype(kind)) for kind, is_on, dtype in other)
        return grad, inference, autocast


@functools.cache
def _device_types() -> tuple[str, ...]:
    """Those that autocast may be on for."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    return tuple(kind for kind in kinds if torch.amp.is_autocast_available(kind))


@contextlib.contextmanager
def switched(
    grad: bool | None, inference: bool | None, autocast: tuple[tuple[str, bool, torch.dtype], ...]
) -> Iterator[None]:
    """Under other modes (:data:`Switch`).

    Weights that autocast has cast are not kept: of a cast without gradient other code would lose the gradient unseen.
    """
    with contextlib.ExitStack() as stack:
        if inference is not None:
            stack.enter_context(torch.inference_mode(inference))
        if grad is not None:
            stack.enter_context(torch.set_grad_enabled(grad))
        for kind, enabled, dtype in autocast:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


class _Calling(threading.local):
    depth = 0


_calling = _Calling()


@contextlib.contextmanager
def calling_whole() -> Iterator[None]:
    """Around code of a graph that calls modules taken whole, which are guarded against being called by themselves."""
    _calling.depth += 1
    try:
        yield
    finally:
        _calling.depth -= 1


def is_called_whole() -> bool:
    """Whether a graph calls a module that is taken whole."""
    return _calling.depth > 0


def mark_call(number: int, path: str, x: fx.Node, value: fx.Node) -> None:
    """Note one call of a module that the caller named: ``value = module(x)``; ``number`` is its own in its graph."""
    x.meta[TAKEN] = (*x.meta.get(TAKEN, ()), number)
    value.meta[GIVEN] = (number, path)
