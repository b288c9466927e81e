"""Same: whether a graph that takes numbers as inputs is, for given values, another graph that has them built in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from mfx.capture.tracer import Constant

_FAILED = object()


def same_computation(general: fx.Graph, alone: fx.Graph, inputs: Sequence[Any]) -> bool:
    """Whether ``general``, called with ``inputs``, runs the operations of ``alone``, one by one.

    What ``general`` computes from numbers alone is computed here; all else must be the same operation on the same
    values, in the same order.
    """
    remaining = iter(alone.nodes)
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in general.nodes:
        if node.op == "placeholder":
            value = next(given)
            if not isinstance(value, torch.Tensor):
                values[node] = value
                continue
        elif node.all_input_nodes and all(_is_plain(values.get(source, node)) for source in node.all_input_nodes):
            values[node] = _computed(node, values)
            if values[node] is not _FAILED:
                continue
        other = next(remaining, None)
        if other is None or not _same_node(node, other, values):
            return False
        values[node] = other
    return next(remaining, None) is None


def _is_plain(value: Any) -> bool:
    return not isinstance(value, fx.Node)


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of an operation on numbers."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != "_operator":
        return _FAILED
    args = map_arg(node.args, values.__getitem__)
    try:
        return node.target(*args)  # type: ignore[operator,misc]
    except (ArithmeticError, TypeError, ValueError):
        return _FAILED


def _same_node(node: fx.Node, other: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.op != other.op or not _same_target(node.target, other.target):
        return False
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return node.op == "placeholder" or repr((args, kwargs)) == repr((other.args, other.kwargs))


def _same_target(one: Any, other: Any) -> bool:
    if isinstance(one, Constant) and isinstance(other, Constant):
        if not isinstance(one.value, torch.Tensor) or not isinstance(other.value, torch.Tensor):
            return one.value is other.value
        return one.value.dtype == other.value.dtype and torch.equal(one.value, other.value)
    return one == other
