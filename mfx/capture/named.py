"""Named: modules that the caller named to be blocks, and marks on their calls in Dynamo's graphs.

A capture marks the value that such a call takes and the value that it gives, on the nodes themselves, so that the
marks outlive copies of the graph.  :class:`mfx.capture.tracer.Tracer` leaves the module as one node, and marks it and
its first tensor; Dynamo traces through the module, so :func:`teach` has it mark the first argument and the value of the
call.

A module that FSDP2 shards is run by its own call alone (:mod:`mfx.sharding`), so there a Dynamo capture has one node,
:class:`Called`, as the tracer has.

Source: torch/_dynamo/variables/nn_module.py, alike in torch 2.11 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from mfx.graph.notes import calling_whole, mark_call
from mfx.options import Options, check_patterns
from mfx.torch_versions import dynamo, fsdp_state

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


def sharded_within(model: nn.Module, named: Mapping[int, str]) -> dict[int, str]:
    """The path of each module that FSDP2 shards and that is ``named``, or inside one that is, by its id."""
    outer = tuple(f"{path}." for path in named.values())
    found = ((path, module) for path, module in model.named_modules() if f"{path}.".startswith(outer))
    return {id(module): path for path, module in found if fsdp_state(module) is not None}


@contextlib.contextmanager
def recording(modules: Mapping[int, str], called: Mapping[int, str] = MappingProxyType({})) -> Iterator[None]:
    """Have Dynamo mark the calls of ``modules`` (path by id) in the graphs that it captures meanwhile.

    Those of ``called`` become one node each.
    """
    teach()
    _everywhere.append((modules, called))
    try:
        yield
    finally:
        _everywhere.pop()


_everywhere: list[tuple[Mapping[int, str], Mapping[int, str]]] = []


class Called:
    """Stands for the call of a module in a graph of Dynamo's, where that is one node."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self.module, self.path = module, path
        self.__name__ = self.__qualname__ = "called"
        self.__module__ = "mfx"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on Dynamo's fake tensors, in their mode."""
        tables: list[dict[str, Any]] = []
        for module in self.module.modules():
            tables += [module._parameters, module._buffers]
        held = [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
        try:
            for table, name, tensor in held:
                twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                table[name] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
            with calling_whole():
                return self.module(*args, **kwargs)
        finally:
            for table, name, tensor in held:
                table[name] = tensor


def teach() -> None:
    """Have Dynamo mark module calls: those of :func:`recording`, or of a graph's own attribute ``MODULES``."""
    variable = dynamo().UnspecializedNNModuleVariable
    original = getattr(variable, _CALL)
    if getattr(original, "__module__", "") == __name__:
        return  # taught before

    def marked(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        modules, called = _everywhere[-1] if _everywhere else (tx.output.__dict__.get(MODULES), {})
        path = modules.get(id(self.value)) if modules else None
        if id(self.value) in called:
            return _call(self.value, called[id(self.value)], tx, args, kwargs, path)
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
            mark_call(_number(tx), path, x, given)
        return value

    setattr(variable, _CALL, marked)


def _call(module: nn.Module, path: str, tx: Any, args: Any, kwargs: Any, named: str | None) -> Any:
    """The value of a module's call, which becomes one node; it is marked where the module is ``named``."""
    proxies = dynamo().proxy_args_kwargs(args, kwargs)
    proxy = tx.output.create_proxy("call_function", Called(module, path), *proxies)
    x = _node(next(iter((*args, *kwargs.values())), None))
    if named is not None and x is not None:
        mark_call(_number(tx), named, x, proxy.node)
    return dynamo().wrap_fx_proxy(tx=tx, proxy=proxy)


def _number(tx: Any) -> int:
    """The number of the next call that is marked."""
    tx.output.__dict__[_NUMBERS] = tx.output.__dict__.get(_NUMBERS, 0) + 1
    return tx.output.__dict__[_NUMBERS]


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
