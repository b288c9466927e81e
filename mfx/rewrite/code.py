"""Code: from a graph to a Python function, and chains to functions of their own name."""

from __future__ import annotations

import hashlib
import linecache
import types
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from mfx.rewrite.switches import all_left, has_switches
from mfx.run import ChainSpec, run


def chain_function(spec: ChainSpec, bound: nn.Module | None = None) -> Callable[..., Any]:
    """The chain as a function of its own name, which is what a graph prints; so is ``plan``, which is for readers."""

    def momentum(root: nn.Module, x: Any, velocity: Any, *operands: Any, plan: str = "") -> Any:
        return run(spec, root, x, velocity, *operands)

    def momentum_of_tensors(x: Any, velocity: Any, *operands: Any, seed: Any = None) -> Any:
        assert bound is not None
        return run(spec, bound, x, velocity, *operands, seed=seed)

    function = momentum if bound is None else momentum_of_tensors
    function.__name__ = function.__qualname__ = spec.name
    function.__module__ = "mfx"
    return function


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function of a graph whose first placeholder is the root module.

    The root is given twice: as ``self`` for the modules named by path, and as the value that chains take.
    """
    code = graph.python_code("self")
    # One name for one text: what is captured anew finds its source again, and traces of both are the same.
    filename = f"<mfx {name} {hashlib.sha256(code.src.encode()).hexdigest()[:8]}>"
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    return _root_twice(scope["forward"], has_switches(graph))


def _root_twice(function: Any, switches: bool) -> Callable[..., Any]:
    def call(root: nn.Module, *inputs: Any) -> Any:
        if not switches:
            return function(root, root, *inputs)
        with all_left():
            return function(root, root, *inputs)

    call.__wrapped__ = function, switches  # type: ignore[attr-defined]
    return call


def with_calls(compiled: Any, calls: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A compiled graph with other chain functions, by their names; nothing is compiled anew."""
    function, switches = compiled.__wrapped__
    scope = dict(function.__globals__)
    for key, value in scope.items():
        if getattr(value, "__module__", None) == "mfx" and getattr(value, "__name__", None) in calls:
            scope[key] = calls[value.__name__]
    return _root_twice(types.FunctionType(function.__code__, scope, function.__name__), switches)
