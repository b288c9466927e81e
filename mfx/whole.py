"""Whole: calls of modules that the caller named to be blocks, marked in a graph.

A capture marks the value that such a call takes and the value that it gives, on the nodes themselves, so that the
marks outlive copies of the graph:

1. :class:`mfx.tracer.Tracer` leaves the module as one node, and marks it and its first tensor;
2. Dynamo traces through the module; :func:`recording` has it mark the first argument and the value of the call;
3. :func:`calls_of` reads the marks of a graph.

Source: torch/_dynamo/variables/nn_module.py, alike in torch 2.11 and 2.15.
Known limits: of modules inside one another that are named both, the outer one counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from mfx import operations
from mfx.dataflow import SHAPE
from mfx.options import Options, check_patterns

TAKEN = "mfx_taken"
"""node.meta key: the numbers of the calls that take this value as x."""
GIVEN = "mfx_given"
"""node.meta key: number and module path of the call that gives this value."""
STATE = "_mfx"
"""The attribute in which a module holds its momentum side (:mod:`mfx.parts`); such a module is always taken whole."""
MODULES = "_mfx_modules"
"""The attribute of Dynamo's output graph for the paths of the modules to be marked, by id."""


@dataclass(frozen=True)
class Call:
    """One call of a module: ``value = module(x)``."""

    path: str
    x: fx.Node
    value: fx.Node


def named_modules(model: nn.Module, options: Options) -> dict[int, str]:
    """The path of each module that ``options`` name to be taken whole, by its id."""
    if not options.modules:
        return {}
    paths = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    check_patterns("modules", options.modules, paths, "module")
    return {id(paths[path]): path for path in reversed(options.named(paths))}


def mark(number: int, path: str, x: fx.Node, value: fx.Node) -> None:
    """Mark one call; ``number`` is its own in its graph."""
    x.meta[TAKEN] = (*x.meta.get(TAKEN, ()), number)
    value.meta[GIVEN] = (number, path)


def calls_of(graph: fx.Graph) -> tuple[Call, ...]:
    """The marked calls of ``graph``, in order of their values."""
    takers = {number: node for node in graph.nodes for number in node.meta.get(TAKEN, ())}
    given = [(node, *node.meta[GIVEN]) for node in graph.nodes if GIVEN in node.meta and node.op != "placeholder"]
    return tuple(Call(path, takers[number], _first(node)) for node, number, path in given if number in takers)


def _first(node: fx.Node) -> fx.Node:
    """The value of a call, or the first of several: what is only ever indexed, and not known to be one tensor."""
    if SHAPE in node.meta or not node.users or not all(operations.takes_item(user) for user in node.users):
        return node
    return next((user for user in node.users if user.args[1] == 0), node)


@contextlib.contextmanager
def recording(modules: Mapping[int, str]) -> Iterator[None]:
    """Have Dynamo mark the calls of ``modules`` (path by id) in the graphs that it captures meanwhile."""
    teach()
    _everywhere.append(modules)
    try:
        yield
    finally:
        _everywhere.pop()


_everywhere: list[Mapping[int, str]] = []


def teach() -> None:
    """Have Dynamo mark module calls: those of :func:`recording`, or of a graph's own attribute ``MODULES``."""
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable

    original = getattr(UnspecializedNNModuleVariable, _CALL)
    if getattr(original, "__module__", "") == __name__:
        return

    def marked(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        modules = _everywhere[-1] if _everywhere else tx.output.__dict__.get(MODULES)
        path = modules.get(id(self.value)) if modules else None
        if path is None or tx.output.__dict__.get(_INSIDE):
            return original(self, tx, args, kwargs)
        x = _node(next(iter((*args, *kwargs.values())), None))
        tx.output.__dict__[_INSIDE] = True
        try:
            value = original(self, tx, args, kwargs)
        finally:
            tx.output.__dict__[_INSIDE] = False
        given = _node(value)
        if x is not None and given is not None:
            numbers = tx.output.__dict__.setdefault(_NUMBERS, [])
            numbers.append(path)
            mark(len(numbers), path, x, given)
        return value

    setattr(UnspecializedNNModuleVariable, _CALL, marked)


_CALL = "call_function"
"""Dynamo's method for calls of modules."""
_INSIDE = "_mfx_inside"
_NUMBERS = "_mfx_numbers"


def _node(variable: Any) -> fx.Node | None:
    """The node of a tensor, or of the first of several, among Dynamo's values."""
    from torch._dynamo.variables import TensorVariable

    if variable is None:
        return None
    variable = variable.realize()
    if isinstance(variable, TensorVariable):
        return variable.as_proxy().node
    items = getattr(variable, "items", None)
    return _node(items[0]) if isinstance(items, list) and items else None
