"""Notes: everything that mfx writes on other people's objects, with its meaning.

A capture owes its graph the notes of the first group on every node, those of the second where they apply.  Whoever
reads a graph reads notes, and asks no capture.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

SCOPE = "mfx_scope"
"""On every node: the :class:`Scope` in which it ran."""

FRAMES = "mfx_frames"
"""On every node: the Python functions that it ran in, from the model's forward inwards, each as (file, name)."""

RETURNED = "mfx_returned"
"""Where a module call ended in the value: the set of scopes whose forward returned it."""
SHAPE = "mfx_shape"
"""Where shapes are known: the shape of the value."""
DTYPE = "mfx_dtype"
"""Where shapes are known: the dtype of the value."""
DTYPE_KEPT = "mfx_dtype_kept"
"""On a cast, where dtypes are known: whether it leaves the dtype as it is."""
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
ADDED = "momentum_velocity"
"""The one child a momentumized model has beyond the original's: its learned velocities."""


@dataclass(frozen=True)
class Scope:
    """One call of one module: its path, and how many calls of it came before."""

    path: str
    call: int


def mark_call(number: int, path: str, x: fx.Node, value: fx.Node) -> None:
    """Note one call of a module that the caller named: ``value = module(x)``; ``number`` is its own in its graph."""
    x.meta[TAKEN] = (*x.meta.get(TAKEN, ()), number)
    value.meta[GIVEN] = (number, path)
