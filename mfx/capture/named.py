"""Named: modules that the caller named to be blocks, and marks on their calls in Dynamo's graphs.

A capture marks the value that such a call takes and the value that it gives, on the nodes themselves, so that the
marks outlive copies of the graph.  :class:`mfx.capture.tracer.Tracer` leaves the module as one node, and marks it and
its first tensor; Dynamo traces through the module, so :func:`teach` has it mark the first argument and the value of the
call.

Source: torch/_dynamo/variables/nn_module.py, alike in torch 2.11 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from mfx.graph.notes import mark_call
from mfx.options import Options, check_patterns
from mfx.torch_versions import dynamo

MODULES = "_mfx_modules"
"""The attribute of Dynamo's output graph for the paths of the modules to be marked, by id."""


def named_modules(model: nn.Module, options: Options, prefix: str = "") -> dict[int, str]:
    """The path of each module that ``options`` name to be taken whole, by its id.

    ``prefix`` is the path of ``model`` in the model that the options are about; paths are relative to ``model``.
    """
    if not options.modules:
        return {}
    start = f"{prefix}." if prefix else ""
    paths = {f"{start}{path}": module for path, module in model.named_modules(remove_duplicate=False) if path}
    if not options.checked:
        check_patterns("modules", options.modules, paths, "module")
    return {id(paths[path]): path.removeprefix(start) for path in reversed(options.named(paths))}


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
    variable = dynamo().UnspecializedNNModuleVariable
    original = getattr(variable, _CALL)
    if getattr(original, "__module__", "") == __name__:
        return  # taught before

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
            mark_call(len(numbers), path, x, given)
        return value

    setattr(variable, _CALL, marked)


_CALL = "call_function"
"""Dynamo's method for calls of modules."""
_INSIDE = "_mfx_inside"
_NUMBERS = "_mfx_numbers"


def _node(variable: Any) -> fx.Node | None:
    """The node of a tensor, or of the first of several, among Dynamo's values."""
    if variable is None:
        return None
    variable = variable.realize()
    if isinstance(variable, dynamo().TensorVariable):
        return variable.as_proxy().node
    items = getattr(variable, "items", None)
    return _node(items[0]) if isinstance(items, list) and items else None
