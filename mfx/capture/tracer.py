"""A symbolic tracer whose graphs say where each node ran, and which changes nothing in the model.

Beyond :class:`torch.fx.Tracer`:

1. every node carries its :class:`Scope` (module path and call number), and the value that a module's
   forward returns is marked with the call it leaves;
2. parameters *and* buffers are ``get_attr`` nodes, so neither is frozen into the graph;
3. factories take symbolic sizes, dtypes and devices, and random ones are always recorded: no draw is frozen;
4. constants met on the way are held by the graph, not written into the model;
5. ``x += y`` is recorded as a write to x;
6. forward hooks of entered modules do not run (they would see symbolic values);
7. every node carries the grad mode and autocast state that it ran under (:class:`mfx.graph.notes.Modes`);
8. custom autograd Functions are one node each; tensors are tensors to ``isinstance`` (:mod:`mfx.capture.values`).

Known limits: control flow that depends on a tensor's value or shape cannot be followed.
Source: torch/fx/_symbolic_trace.py; the factory patching follows the idea of Hugging Face's tracer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from mfx.capture.values import answer_if_finite, answered, applied, functions_kept, tensors_to_isinstance
from mfx.errors import CaptureError
from mfx.graph import operations
from mfx.graph.draws import RANDOM
from mfx.graph.notes import ENTERED, FRAMES, LIFTED, MODES, NUMBER, RETURNED, SCOPE, STATE, Modes, Scope, mark_call
from mfx.torch_versions import pytree

_FACTORIES = (
    "arange linspace logspace zeros ones full empty eye tensor as_tensor scalar_tensor tril_indices "
    "triu_indices finfo iinfo zeros_like ones_like full_like empty_like"
).split()
_RANDOM_FACTORIES = [name for name, draw in RANDOM.items() if draw.factory]
_CONTAINERS = (
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_PASSED_BY = (__file__, *map(inspect.getfile, (fx.Proxy, fx.Tracer, nn.Module)))


class Constant:
    """A value the graph holds for itself; calling it gives the value."""

    def __init__(self, value: Any, index: int) -> None:
        self.value = value
        self.__name__ = self.__qualname__ = f"constant_{index}"
        self.__module__ = "mfx"

    def __call__(self) -> Any:
        return self.value


_followed: list[object] = []


@contextlib.contextmanager
def following(who: object) -> Iterator[None]:
    """Around a run of a model's own Python that is looked at, and gives its caller nothing."""
    _followed.append(who)
    try:
        yield
    finally:
        _followed.pop()


def is_followed() -> bool:
    """Whether Python runs only to be looked at: on symbolic values, or for a proof."""
    return bool(_followed)


def follower() -> object:
    """Who follows it; None where nobody does."""
    return _followed[-1] if _followed else None


class Tracer(fx.Tracer):
    """Traces ``forward(root, *proxies)``; modules in ``named`` (path by id) and ``called_only`` (ids) are taken whole.

    ``arguments`` and ``kinds`` are the names and types of the proxies: tensors, and numbers that may vary; ``answers``
    the first to questions whether values are finite, if such may be asked.  Further ones get that of finite values.
    """

    proxy_buffer_attributes = True
    answers: tuple[bool, ...] | None = None
    asked: tuple[bool, ...] = ()

    def __init__(
        self, entry: Callable[..., Any], arguments: list[str], kinds: list[type], named: Mapping[int, str]
    ) -> None:
        super().__init__()
        self.entry = entry
        self.arguments = arguments
        self.kinds = kinds
        self.named = named
        self.called_only: Collection[int] = ()
        self.current = Scope("", 0)
        self.failed_in: Scope | None = None
        self.entered: dict[str, nn.Module] = {}
        self.called: dict[str, nn.Module] = {}
        self.calls: Counter[str] = Counter()
        self.momentumized: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._numbers = count()
        self._constants: dict[int, Constant] = {}
        self._values: list[weakref.ref[_Value]] = []
        self._paths: dict[int, str] = {}

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        self.entered[""] = root
        owned = [*root.named_parameters(), *root.named_buffers()]
        self._paths = {id(tensor): path for path, tensor in reversed(owned)}
        with following(self), _symbolic_factories(self), functions_kept(self._apply), tensors_to_isinstance(root):
            return super().trace(root, concrete_args)

    def _apply(self, function: type[Any], grad: bool, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """A call of a custom autograd Function; one without symbolic values runs as it is."""
        target, given = applied(function, args)
        if not any(isinstance(value, fx.Proxy) for value in given):
            return run()
        with torch.set_grad_enabled(grad):
            return self.create_proxy("call_function", target, tuple(given), {})

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = []
        for name, kind in zip(self.arguments, self.kinds, strict=True):
            node = self.create_node("placeholder", name, (), {})
            if kind is not torch.Tensor:
                node.meta |= {NUMBER: True, LIFTED: "number"}
            proxies.append(self.proxy(node))
        return self.entry, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self.named or id(m) in self.called_only or STATE in m.__dict__:
            return True
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _CONTAINERS)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.answers is None or (usual := answer_if_finite(obj.node)) is None:
            return super().to_bool(obj)
        self.asked += (*self.answers, usual)[min(len(self.asked), len(self.answers)) :][:1]
        self.create_proxy("call_function", answered, (obj, self.asked), {})
        return self.asked[-1]

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            self.called[path] = m
            if STATE in m.__dict__:
                self.momentumized[path] = args, kwargs
            proxy = self.create_proxy("call_module", path, args, kwargs)
            if id(m) in self.named and proxy.node.all_input_nodes:
                mark_call(next(self._numbers), self.named[id(m)], proxy.node.all_input_nodes[0], proxy.node)
            return proxy
        outer, self.current = self.current, Scope(path, self.calls[path])
        self.calls[path] += 1
        self.entered[path] = m
        _mark(ENTERED, next((v for v in (*args, *kwargs.values()) if isinstance(v, fx.Proxy)), None), self.current)
        try:
            value = m.forward(*args, **kwargs)
            _mark(RETURNED, value, self.current)
        except Exception:
            self.failed_in = self.failed_in or self.current
            raise
        finally:
            self.current = outer
        return value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[SCOPE] = self.current
        node.meta[FRAMES] = _frames()
        node.meta[MODES] = Modes.current()
        node.meta[NUMBER] = _is_number(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        self._values.append(weakref.ref(value))
        return value

    def left(self, held: Iterable[Any]) -> fx.Node | None:
        """The node of a symbolic value that somebody holds beside ``held`` and arguments of momentumized modules."""
        known = {id(leaf) for call in (*self.momentumized.values(), held) for leaf in pytree.tree_leaves(call)}
        values = (reference() for reference in self._values)
        return next((value.node for value in values if value is not None and id(value) not in known), None)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, torch.Tensor) and id(attr_val) in self._paths:
            return self.create_proxy("get_attr", self._paths[id(attr_val)], (), {})
        return attr_val

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            if id(a) in self._paths:
                return self.create_node("get_attr", self._paths[id(a)], (), {})
            return self.create_node("call_function", self._constant(a), (), {})
        if isinstance(a, torch.Generator):
            return self.create_node("call_function", self._constant(a), (), {})
        return super().create_arg(a)

    def _constant(self, value: Any) -> Constant:
        return self._constants.setdefault(id(value), Constant(value, len(self._constants)))


class _Value(fx.Proxy):
    """A symbolic value that records ``x += y``, and ``x[i] = y``, as the write to x that it is."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __hash__(self) -> int:
        # A dict or set would look a number up by identity, and say in silence that it is not there.
        if self.node.meta.get(LIFTED) == "number":
            raise CaptureError("a number of the call is looked up in a dict or set, so it cannot vary in one graph")
        return super().__hash__()


def _augmented(name: str) -> Callable[[_Value, Any], fx.Proxy]:
    def assign(self: _Value, other: Any) -> fx.Proxy:
        # Python rebinds the name of a number: who holds the old one keeps it.
        target = getattr(operator, name.removeprefix("i") if self.node.meta[NUMBER] else name)
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return assign


for _name in "iadd isub imul itruediv ifloordiv imod ipow ilshift irshift ixor".split():
    setattr(_Value, f"__{_name}__", _augmented(_name))


def _frames() -> tuple[tuple[str, str], ...]:
    """The functions that are running, but for torch's and the tracer's own, from the outside inwards."""
    found = []
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "trace":
        code = frame.f_code
        if code.co_filename not in _PASSED_BY:
            found.append((code.co_filename, code.co_name))
        frame = frame.f_back
    return tuple(reversed(found))


def _is_number(node: fx.Node) -> bool:
    """Whether the value is a size or the like, or what Python computes from such."""
    if operations.is_query(node):
        return True
    python = getattr(node.target, "__module__", "") == "_operator"
    inputs = node.all_input_nodes
    return python and bool(inputs) and all(source.meta.get(NUMBER, False) for source in inputs)


def _mark(note: str, value: Any, scope: Scope) -> None:
    values = value if isinstance(value, (tuple, list)) else (value,)
    for item in values:
        if isinstance(item, fx.Proxy):
            item.node.meta.setdefault(note, set()).add(scope)


@contextlib.contextmanager
def _symbolic_factories(tracer: Tracer) -> Iterator[None]:
    """Let torch's factory functions record themselves while ``tracer`` is at work."""
    places: list[tuple[Any, str]] = [(torch, name) for name in _FACTORIES + _RANDOM_FACTORIES]
    places.append((torch.nested, "nested_tensor_from_jagged"))  # itself refuses to be traced
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, original in originals:
        setattr(place, name, _recording(tracer, original, always=name in _RANDOM_FACTORIES))
    try:
        yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def _recording(tracer: Tracer, original: Callable[..., Any], always: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        symbolic: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda a: symbolic.append(a) if isinstance(a, fx.Proxy) else a)
        if always or symbolic:
            return tracer.create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return factory
