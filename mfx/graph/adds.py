"""Adds: every way to write the sum of two tensors.  A new form of add goes here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mfx.graph.operations import INPLACE_OPERATORS, is_known, name_of


@dataclass(frozen=True)
class Add:
    """``left + scale * right``, and which operand the result is written into, if any."""

    left: fx.Node
    right: fx.Node
    scale: float | fx.Node = 1.0
    written: fx.Node | None = None


def add_form(node: fx.Node) -> Add | None:
    """The operands of a two-tensor add or subtraction; None for every other node."""
    if node.op not in ("call_function", "call_method") or not is_known(node):
        return None
    name = name_of(node)
    plain = name.rstrip("_")
    if plain not in ("add", "iadd", "sub", "isub", "subtract") or node.kwargs.get("out") is not None:
        return None
    operands = [*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    left, right = operands
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    alpha = node.kwargs.get("alpha", 1)
    sign = -1 if "sub" in plain else 1
    scale = alpha if isinstance(alpha, fx.Node) else sign * float(alpha)  # type: ignore[arg-type]
    in_place = name.endswith("_") or name in INPLACE_OPERATORS
    return Add(left, right, scale, left if in_place else None)
