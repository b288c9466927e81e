"""Code: from a graph to a Python function, and chains to functions of their own name."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx.graph.notes import GIVEN, calling_whole
from mfx.rewrite.compiled import function_of, in_traces
from mfx.rewrite.regional import as_asked
from mfx.rewrite.switches import all_left, has_switches
from mfx.rule import StepSpec
from mfx.rule.arithmetic.precision import default_tolerance
from mfx.run import ChainSpec, recomputed, run
from mfx.run.detector import Drift


def chain_function(
    spec: ChainSpec, bound: nn.Module | None = None, now: Callable[[ChainSpec], ChainSpec] = lambda spec: spec
) -> Callable[..., Any]:
    """The chain as a function of its own name, which is what a graph prints; so is ``plan``, which is for readers.

    ``now`` is asked, at each call of a chain that is ``bound``, what it is to run with.
    """

    def momentum(root: nn.Module, x: Any, velocity: Any, *operands: Any, gammas: Any = None, plan: str = "") -> Any:
        return traced(as_asked(spec, root), root, x, velocity, *operands, gammas=gammas)

    def momentum_of_tensors(x: Any, velocity: Any, *operands: Any, gammas: Any = None) -> Any:
        assert bound is not None
        return traced(now(spec), bound, x, velocity, *operands, gammas=gammas)

    traced = in_traces(f"mfx {spec.name}", run)
    function = momentum if bound is None else momentum_of_tensors
    function.__name__ = function.__qualname__ = spec.name
    function.__module__ = "mfx"
    return function


def segment_function(spec: StepSpec, index: int, bound: nn.Module | None = None) -> Callable[..., Any]:
    """A segment as a function of its own name."""
    drift = Drift()

    def told(off: Tensor, dtype: torch.dtype) -> None:
        drift.record(off, spec.name, default_tolerance(dtype))

    def segment(root: nn.Module, *inputs: Any) -> Any:
        drift.poll()
        return recomputed(spec, root, *inputs, told=told)

    def segment_of_tensors(*inputs: Any) -> Any:
        assert bound is not None
        return segment(bound, *inputs)

    function = segment if bound is None else segment_of_tensors
    function.__name__ = function.__qualname__ = f"segment_{index}"
    function.__module__ = "mfx"
    return function


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function of a graph whose first placeholder is the root module.

    The root is given twice: as ``self`` for the modules named by path, and as the value that chains take.
    """
    code = graph.python_code("self")
    function = function_of(code.src, code.globals, name)
    around = [all_left] if has_switches(graph) else []
    if any(node.op == "call_module" and GIVEN in node.meta for node in graph.nodes):
        around.append(calling_whole)
    return _root_twice(function, around)


def _root_twice(function: Any, around: list[Callable[[], Any]]) -> Callable[..., Any]:
    def call(root: nn.Module, *inputs: Any) -> Any:
        if not around:
            return function(root, root, *inputs)
        with contextlib.ExitStack() as stack:
            for context in around:
                stack.enter_context(context())
            return function(root, root, *inputs)

    call.__wrapped__ = function, around  # type: ignore[attr-defined]
    return call


def with_calls(compiled: Any, calls: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A compiled graph with other chain functions, by their names; nothing is compiled anew."""
    function, around = compiled.__wrapped__
    scope = dict(function.__globals__)
    for key, value in scope.items():
        if getattr(value, "__module__", None) == "mfx" and getattr(value, "__name__", None) in calls:
            scope[key] = calls[value.__name__]
    return _root_twice(types.FunctionType(function.__code__, scope, function.__name__), around)
