"""Sums: what is added up to a value, however many terms there are and however each is scaled.

1. A node that adds two tensors (:class:`Add`), blends (``lerp``), or adds a product (``addcmul``, ``addmm``) has
   *terms*; so has the sum or mean over a stack.
2. A term that is a sum itself, or a multiple of one, stands for its own terms if nobody else reads it.
3. Each term goes back through casts, and through factors that no input decides, to the values that it may be a multiple
   of: its *path*.

Known limits: a sum of more than :data:`MOST` terms has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from mfx.graph import operations
from mfx.graph.notes import LIFTED
from mfx.graph.operations import INPLACE_OPERATORS, is_known, name_of

MOST = 16
"""The most terms of a sum that are looked at."""

_PRODUCTS = frozenset("addcmul addcdiv addmm addbmm baddbmm addmv addr".split())
_CASTS = frozenset("to type type_as float double half bfloat16".split())
_FIXED_WITHIN = 8


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


@dataclass(frozen=True)
class Term:
    """One of the values of a sum: ``path`` are those it may be a multiple of, the nearest first.

    ``by`` are the values among the factors; ``within`` are the sums between; ``kept`` says that no factor is known to
    be negative, or that it is only a factor itself.
    """

    path: tuple[fx.Node, ...]
    kept: bool = True
    by: tuple[fx.Node, ...] = ()
    within: tuple[fx.Node, ...] = ()


def sum_of(node: fx.Node, root: nn.Module) -> tuple[Term, ...]:
    """The terms of the sum that ``node`` is; none where it is no sum."""
    terms: list[Term] = []
    for term in _terms(node):
        for found in _expanded(term, root):
            terms.append(found)
            if len(terms) > MOST:
                return ()
    return tuple(terms)


def is_scaling(node: fx.Node) -> bool:
    """Whether the node multiplies, divides, adds or subtracts element by element."""
    name = name_of(node).strip("_")
    return name in ("mul", "imul", "multiply", "div", "truediv", "addcmul", "rsub") or bool(_terms(node))


def _terms(node: fx.Node) -> list[Term]:
    """The terms of one operation."""
    if node.op not in ("call_function", "call_method") or not is_known(node):
        return []
    name = name_of(node).rstrip("_")
    form = add_form(node)
    if form is not None:
        return [Term((form.left,)), Term((form.right,), _is_positive(form.scale))]
    operands = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node)]
    if name == "lerp" and len(operands) >= 2:
        return [Term((operand,), by=tuple(operands[2:])) for operand in operands[:2]]
    if name in _PRODUCTS and len(operands) >= 3:
        beta = operations.argument(node, 5, "beta", 1.0)
        return [Term((operands[0],), _is_positive(beta)), *(Term((operand,), False) for operand in operands[1:])]
    return _of_stack(node) if name in ("sum", "mean") else []


def _of_stack(node: fx.Node) -> list[Term]:
    """The terms of the sum over a stack of values."""
    stack = node.args[0] if node.args else None
    if not isinstance(stack, fx.Node) or name_of(stack) != "stack" or len(stack.users) != 1:
        return []
    values, dim = stack.args[0], operations.argument(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    alike = dim == operations.argument(stack, 1, "dim", 0) and not operations.argument(node, 2, "keepdim", False)
    nodes = [value for value in values if isinstance(value, fx.Node)] if isinstance(values, (tuple, list)) else []
    return [Term((value,)) for value in nodes] if alike and len(nodes) > 1 else []


def _expanded(term: Term, root: nn.Module) -> Iterator[Term]:
    """A term with its path, or the terms that it stands for."""
    node = term.path[0]
    path, by, kept, within, own = [node], [*term.by], term.kept, [*term.within], True
    while True:
        own = own and _readers(node) == 1
        inner = _terms(node) if own and len(within) < MOST else []
        if inner:
            for one in inner:
                whole = replace(one, kept=one.kept and kept, by=(*by, *one.by), within=(*within, node))
                yield from _expanded(whole, root)
            return
        scaled = _unscaled(node, root)
        if scaled is None:
            yield Term(tuple(path), kept, tuple(by), tuple(within))
            return
        node, factor, positive = scaled
        path.append(node)
        by += [] if factor is None else [factor]
        kept = kept and positive


def _readers(node: fx.Node) -> int:
    return sum(not operations.is_query(user) for user in node.users)


def _unscaled(node: fx.Node, root: nn.Module) -> tuple[fx.Node, fx.Node | None, bool] | None:
    """What a node is a multiple of, the factor where it is a value, and whether that may be positive."""
    if operations.is_noop(node, root) and node.all_input_nodes:
        return node.all_input_nodes[0], None, True
    if node.op not in ("call_function", "call_method") or not is_known(node) or not node.args:
        return None
    name = name_of(node).strip("_")
    first, second = node.args[0], operations.argument(node, 1, "other")
    if name in _CASTS and isinstance(first, fx.Node):
        return first, None, True
    if name not in ("mul", "imul", "multiply", "div", "truediv"):
        return None
    if isinstance(first, fx.Node) and (not isinstance(second, fx.Node) or _is_fixed(second)):
        return first, second if isinstance(second, fx.Node) else None, _is_positive(second)
    if isinstance(second, fx.Node) and "mul" in name and (not isinstance(first, fx.Node) or _is_fixed(first)):
        return second, first if isinstance(first, fx.Node) else None, _is_positive(first)
    return None


def _is_positive(factor: object) -> bool:
    """Whether a factor is positive, as far as it is known."""
    return not isinstance(factor, (int, float)) or factor > 0


def _is_fixed(node: fx.Node) -> bool:
    """Whether a value is surely made of parameters and buffers alone."""
    pending, seen = [node], set[fx.Node]()
    while pending and len(seen) < _FIXED_WITHIN:
        here = pending.pop()
        if here.op == "placeholder" and LIFTED not in here.meta:
            return False
        seen.add(here)
        pending += [source for source in here.all_input_nodes if source not in seen]
    return not pending
