"""Rearranging: values that are the elements of another, in another shape or order, or in the same after all.

:func:`source` sees through all that does nothing:

1. operations that give their input (:func:`mfx.graph.operations.is_noop`);
2. permutations and reshapes that undo one another: they are run on a tensor without data, and come to nothing where it
   comes out with its own shape and order;
3. a ``cat`` of all slices of one value, in order.

Known limits: for the second shapes must be known, and copies that a rearrangement needs (a reshape of a transposed
tensor) are not seen through.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn

from mfx.graph import operations
from mfx.graph.notes import SHAPE

MOST = 12
"""Through how many rearrangements that undo one another is looked."""


def source(node: fx.Node, root: nn.Module) -> fx.Node:
    """The value behind nodes that do nothing."""
    while (behind := _behind(node, root)) is not None:
        node = behind
    return node


def _behind(node: fx.Node, root: nn.Module) -> fx.Node | None:
    if node.op == "placeholder" or not node.all_input_nodes:
        return None
    if operations.is_noop(node, root):
        return node.all_input_nodes[0]
    return _unchanged(node) or _whole(node)


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The value that the rearrangements up to ``node`` leave as it is."""
    nodes: list[fx.Node] = []
    shape = node.meta.get(SHAPE)
    while shape is not None and operations.rearranges(node) and len(nodes) < MOST:
        nodes.insert(0, node)
        node = node.all_input_nodes[0]
        if len(nodes) > 1 and node.meta.get(SHAPE) == shape and is_undone(node, nodes):
            return node
    return None


def _whole(node: fx.Node) -> fx.Node | None:
    """The value that ``node`` puts together again of its slices."""
    if operations.name_of(node) not in ("cat", "concat", "concatenate") or node.op != "call_function":
        return None
    pieces, dim = node.args[0] if node.args else None, operations.argument(node, 1, "dim", 0)
    if not isinstance(pieces, (list, tuple)) or len(pieces) < 2 or not isinstance(dim, int):
        return None
    found = [_slice(piece, dim) for piece in pieces]
    wholes = {slice_[0] for slice_ in found if slice_ is not None}
    if None in found or len(wholes) > 1:
        return None
    return wholes.pop() if _covers([slice_[1:] for slice_ in found if slice_ is not None]) else None


def _slice(piece: Any, dim: int) -> tuple[fx.Node, Any, Any] | None:
    """Of what a value is a slice along ``dim``, from where and to where."""
    if not isinstance(piece, fx.Node) or operations.name_of(piece) != "getitem" or piece.op != "call_function":
        return None
    whole, index = piece.args
    index = index if isinstance(index, tuple) else (index,)
    rank = len(piece.meta[SHAPE]) if SHAPE in piece.meta else None
    place = dim if dim >= 0 or rank is None else dim + rank
    if not isinstance(whole, fx.Node) or not all(isinstance(one, slice) for one in index) or place not in range(9):
        return None
    others = [one for at, one in enumerate(index) if at != place]
    if len(index) <= place or any(one != slice(None) for one in others) or index[place].step is not None:  # type: ignore
        return None
    return whole, index[place].start, index[place].stop  # type: ignore[union-attr]


def _covers(bounds: Sequence[tuple[Any, Any]]) -> bool:
    """Whether slices from and to ``bounds`` are all of a value: any two are that meet, more if they are in order."""
    (start, _), (_, stop) = bounds[0], bounds[-1]
    meet = all(one[1] is other[0] or one[1] == other[0] for one, other in itertools.pairwise(bounds))
    inner = [bound[1] for bound in bounds[:-1]]
    ordered = len(inner) < 2 or (all(isinstance(at, int) and at >= 0 for at in inner) and inner == sorted(inner))
    return start in (None, 0) and stop is None and None not in inner and meet and ordered


def before_rearranging(node: fx.Node) -> tuple[fx.Node, ...]:
    """The rearranging operations that ``node`` is the last of, in order."""
    found: list[fx.Node] = []
    while operations.rearranges(node):
        found.append(node)
        node = node.all_input_nodes[0]
    return tuple(reversed(found))


def rearranged(node: fx.Node) -> tuple[fx.Node, ...]:
    """The rearranging operations after ``node``, each the only reader of the one before."""
    found: list[fx.Node] = []
    while True:
        users = [user for user in node.users if not operations.is_query(user)]
        if len(users) != 1 or not operations.rearranges(users[0]) or users[0].all_input_nodes[0] is not node:
            return tuple(found)
        node = users[0]
        found.append(node)


def is_undone(x: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether the rearrangements ``nodes`` of ``x``, one after the other, come to nothing."""
    shape = _sizes(x)
    if shape is None:
        return False
    value = torch.empty(shape, device="meta")
    for node in nodes:
        sizes = _sizes(node)
        if sizes is None:
            return False
        try:
            value = _permuted(value, node) if operations.is_permutation(node) else value.view(sizes)
        except (RuntimeError, IndexError, TypeError):
            return False
        if list(value.shape) != sizes:
            return False
    return list(value.shape) == shape and value.is_contiguous()


def _permuted(value: torch.Tensor, node: fx.Node) -> torch.Tensor:
    name = operations.name_of(node)
    return getattr(value, name)(*node.args[1:], **node.kwargs)


def _sizes(node: fx.Node) -> list[int] | None:
    """The shape, where it is known; sizes that may vary have some number, the same wherever they stand."""
    shape = node.meta.get(SHAPE)
    if shape is None:
        return None
    sizes = [_number(str(size)) for size in shape]
    return None if None in sizes else sizes  # type: ignore[return-value]


@functools.lru_cache(maxsize=4096)
def _number(size: str) -> int | None:
    """A size in numbers: symbols stand for multiples of 48, so that they can be divided."""
    if size.isdigit():
        return int(size)
    expression: Any = sympy.sympify(size)
    digits = {symbol: int("".join(filter(str.isdigit, str(symbol))) or 0) for symbol in expression.free_symbols}
    found: Any = expression.subs({symbol: 48 * (number % 89 + 2) for symbol, number in digits.items()})
    return int(found) if found.is_Integer else None
