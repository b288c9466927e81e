"""Branches as compiled functions: each distinct one is compiled once, and serves all blocks of its structure.

1. What a branch names in its root (modules, parameters, constants) becomes an argument, and its values get names that
   tell of the structure alone, so two branches of one structure are one text.
2. Branches of one text, of the same objects in it, and of inputs of the same sizes as far as they are known, are one
   function, given to ``torch.compile``.  What else decides about the code (sizes that are not, modes, what modules are
   set to) is guarded there; Dynamo limits in how many variants.
3. A branch runs with gradient in forward, too (:mod:`mfx.run.reversible`): so both runs are by the same code, and give
   the same bits.

Reference: "Reducing torch.compile cold start compilation time with regional compilation", PyTorch tutorials.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from mfx.graph.notes import SHAPE
from mfx.rewrite.direct import Direct, is_followed_again
from mfx.rewrite.kernels import fused
from mfx.rule.arithmetic.carry import EAGER, Kernels
from mfx.torch_versions import is_profiled

_made: WeakValueDictionary[Any, Callable[..., Any]] = WeakValueDictionary()
"""What was compiled and is in use; it keeps what its key has the id of."""


@dataclass(frozen=True, eq=False)
class Branches:
    """Makes functions of branch graphs by a ``compiler``, such as ``torch.compile``.

    ``key`` tells compilers apart, and compiled functions keep it; ``kernels`` do the arithmetic of states beside them.
    """

    compiler: Callable[[Callable[..., Any]], Callable[..., Any]]
    key: object
    dynamic: bool | None = None
    kernels: Kernels = EAGER

    @staticmethod
    def by(backend: str | Callable[..., Any], dynamic: bool | None) -> Branches:
        """Those that ``torch.compile`` makes with a backend."""

        compiler = functools.partial(torch.compile, backend=backend, dynamic=dynamic, fullgraph=True)
        return Branches(compiler, backend, dynamic, fused(backend))

    def __call__(self, graph: fx.Graph, copied: Container[fx.Node] = ()) -> Callable[..., Any]:
        """The function of a branch graph that takes the root module, x and the side values.

        Of what nodes ``copied`` give (running statistics, say) the function gets copies.
        """
        named, taken, given = _by_structure(graph)
        kinds = tuple(map(_kind, given))
        compiled = self._compiled(named, kinds) if is_followed_again(graph) else Direct(graph, self.key)
        copies = [node in copied for node in (*taken, *given)]
        paths = [str(node.target) for node in taken]

        def branch(root: nn.Module, *inputs: Any) -> Any:
            values = [*(_attribute(root, path) for path in paths), *map(_plain, inputs)]
            values = list(map(_copy_if, copies, values))
            return compiled(root, *values[len(paths) :]) if isinstance(compiled, Direct) else compiled(None, *values)

        return branch

    def _compiled(self, graph: fx.Graph, kinds: tuple[Any, ...]) -> Callable[..., Any]:
        code = graph.python_code("self")
        names = tuple((name, id(value)) for name, value in sorted(code.globals.items()))
        key = code.src, names, kinds, id(self.key), self.dynamic
        compiled = _made.get(key)
        if compiled is None:
            compiled = _made[key] = self.compiler(function_of(code.src, code.globals, "compiled branch", kinds))
        return compiled


AS_THEY_ARE = Branches(lambda function: function, None)
"""Branches that are not compiled."""


def function_of(source: str, names: Mapping[str, Any], name: str, kinds: Any = None) -> Any:
    """The function ``forward`` of a graph's ``source``, which tracebacks can show.

    One file name for one text (and ``kinds`` of inputs): what is captured anew finds its source again, and traces of
    both are the same.  Dynamo tells functions apart by file when it looks which sizes change, and in torch 2.11 takes
    those without a source file for one.
    """
    filename = f"<mfx {name} {hashlib.sha256(f'{source}{kinds}'.encode()).hexdigest()[:8]}>"
    scope = dict(names)
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    return scope["forward"]


def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of a module that is an argument."""
    return module(*args, **kwargs)


def _kind(node: fx.Node) -> Any:
    """Size and dtype of what an input's node gives, as far as they are known."""
    value = node.meta.get("example_value")
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, Tensor) else node.meta.get(SHAPE)


def _copy_if(copy: bool, value: Any) -> Any:
    return value.clone() if copy and isinstance(value, Tensor) else value


def _plain(value: Any) -> Any:
    """A parameter as any other tensor, which it is in the recomputation."""
    return value.view_as(value) if type(value) is nn.Parameter else value


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _by_structure(graph: fx.Graph) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """The same graph by names that tell of its structure alone.

    Also what it takes of the root (a node for each path) and as inputs, in the order of its arguments.
    """
    named = fx.Graph()
    _, *inputs = graph.find_nodes(op="placeholder")
    paths: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            paths.setdefault(str(node.target), node)
    held = {path: named.placeholder(f"a{number}") for number, path in enumerate(paths)}
    env: dict[fx.Node, Any] = {node: named.placeholder(f"x{number}") for number, node in enumerate(inputs)}
    for number, node in enumerate(graph.nodes):
        args, kwargs = (map_arg(given, env.get) for given in (node.args, node.kwargs))
        if node.op == "get_attr":
            env[node] = held[str(node.target)]
        elif node.op == "output":
            named.output(args[0])
        elif node.op == "call_module":
            env[node] = named.create_node(
                "call_function", called, (held[str(node.target)], *args), kwargs, f"v{number}"
            )
        elif node.op != "placeholder":
            env[node] = named.create_node(node.op, node.target, args, kwargs, f"v{number}")
    named.lint()
    return named, list(paths.values()), inputs


def in_traces(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which has this name in the traces of a profiler, and costs one question where none is at work."""

    def call(*args: Any, **given: Any) -> Any:
        if not is_profiled():
            return function(*args, **given)
        with torch.profiler.record_function(name):
            return function(*args, **given)

    return call
