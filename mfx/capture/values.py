"""Values: what plain symbolic values hide from a model's Python, and calls that they would be lost in.

1. :func:`functions_kept` has each call of a custom ``torch.autograd.Function`` become one opaque node
   (:class:`Applied`), so that its backward is kept.  It looks where torch itself looks a Function's forward up, so that
   ``f = Function.apply``, taken before the tracing, is seen too.
2. :func:`tensors_to_isinstance` has ``isinstance(x, torch.Tensor)`` and ``torch.is_tensor(x)`` say of a symbolic value
   what they say of the real one; where that cannot be known they raise, since a guess would take the wrong branch.
   Only Python's own ``isinstance`` is told: torch's C++ code would take a symbolic value for real memory.

Known limits: of values that are no tensors (tuples, numbers) ``isinstance`` says what it says of a symbolic value; a
wrong branch taken by that is found by :mod:`mfx.capture.proof`.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.function import Function, FunctionMeta
from torch.utils.checkpoint import CheckpointFunction

from mfx.errors import CaptureError, MfxError
from mfx.graph import operations
from mfx.graph.notes import NUMBER, STATE
from mfx.torch_versions import FakeTensor, pytree

Handler = Callable[[type[Function], bool, tuple[Any, ...], Callable[[], Any]], Any]
"""``handler(function, grad, args, run)``: the value of ``function.apply(*args)``, called under the grad mode ``grad``;
``run()`` gives what it would have been."""


class Applied:
    """``function.apply``, with those of its arguments that no graph can hold."""

    def __init__(self, function: type[Function], spec: pytree.TreeSpec, held: dict[int, Any]) -> None:
        self.function = function
        self.spec = spec
        self.held = held
        # No name of an operation ends like this, and the module is none that is known: the node is opaque.
        self.__name__ = self.__qualname__ = f"{function.__name__}_apply"
        self.__module__ = "autograd_function"

    def __call__(self, *values: Any) -> Any:
        given = iter(values)
        flat = [self.held[place] if place in self.held else next(given) for place in range(self.spec.num_leaves)]
        return self.function.apply(*pytree.tree_unflatten(flat, self.spec))


def applied(function: type[Function], args: tuple[Any, ...]) -> tuple[Applied, list[Any]]:
    """What a node for ``function.apply(*args)`` calls, and the node's arguments."""
    flat, spec = pytree.tree_flatten(args)
    held = {place: leaf for place, leaf in enumerate(flat) if not isinstance(leaf, (fx.Proxy, torch.Tensor))}
    return Applied(function, spec, held), [leaf for place, leaf in enumerate(flat) if place not in held]


@contextlib.contextmanager
def functions_kept(handler: Handler) -> Iterator[None]:
    """Have ``handler`` give the values of custom Functions.

    ``torch.utils.checkpoint`` is no function of its own: what it holds runs as if it were not there.
    """
    grads: list[bool] = []

    def lookup(cls: Any, name: str) -> Any:
        found = type.__getattribute__(cls, name)
        if name == "_backward_cls":  # asked for as apply begins; forward itself runs without gradient
            grads.append(torch.is_grad_enabled())
        elif name == "forward" and grads:
            return _forward(cls, found, grads.pop(), handler)
        elif name == "setup_context" and found != type.__getattribute__(Function, name):
            return lambda ctx, inputs, output: None if isinstance(output, fx.Proxy) else found(ctx, inputs, output)
        return found

    before = FunctionMeta.__dict__.get("__getattribute__")
    FunctionMeta.__getattribute__ = lookup  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del FunctionMeta.__getattribute__
        else:
            FunctionMeta.__getattribute__ = before  # type: ignore[method-assign]


def _forward(cls: type[Function], forward: Callable[..., Any], grad: bool, handler: Handler) -> Callable[..., Any]:
    with_context = type.__getattribute__(cls, "setup_context") == type.__getattribute__(Function, "setup_context")

    @functools.wraps(forward)
    def run(*args: Any) -> Any:
        given = args[1:] if with_context else args
        if cls is CheckpointFunction:
            with torch.set_grad_enabled(grad):
                return given[0](*given[2:])
        return handler(cls, grad, given, lambda: forward(*args))

    return run


@contextlib.contextmanager
def tensors_to_isinstance(root: nn.Module) -> Iterator[None]:
    """Answer Python's questions for tensors among the symbolic values of a trace of ``root``."""
    original = builtins.isinstance

    def asked(value: Any, kinds: Any, /) -> bool:
        if not original(value, fx.Proxy) or original(value, kinds) or not _concerns(kinds, original):
            return original(value, kinds)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # torch's and our own code know what a symbolic value is, but for torch.is_tensor.
        if caller.startswith(("torch.", "mfx.")):
            return False
        known = _type_of(value.node, root)
        special = value.node.op == "placeholder" and known is torch.Tensor and not issubclass(known, kinds)
        if known is None or special:
            raise CaptureError(
                f"forward asks whether {value.node} is a tensor, or one of a class of its own (isinstance, "
                "torch.is_tensor), which symbolic tracing cannot know of it. Pass capture='dynamo' and example_inputs="
            )
        return issubclass(known, kinds)

    builtins.isinstance = asked
    try:
        yield
    finally:
        builtins.isinstance = original


def _concerns(kinds: Any, original: Callable[[Any, Any], bool]) -> bool:
    """Whether a tensor is of one of ``kinds``."""
    several = kinds if original(kinds, tuple) else getattr(kinds, "__args__", (kinds,))
    return any(
        _concerns(kind, original) if original(kind, tuple) else original(kind, type) and issubclass(kind, torch.Tensor)
        for kind in several
    )


def _type_of(node: fx.Node, root: nn.Module) -> type | None:
    """Tensor or Parameter, or object for what is none; None where it is not known."""
    if node.meta.get(NUMBER):
        return object
    if node.op == "placeholder":
        return torch.Tensor
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return nn.Parameter if name in root.get_submodule(owner)._parameters else torch.Tensor
    if node.op == "call_module":
        return _type_of_module_value(root.get_submodule(str(node.target)))
    value = getattr(node.target, "value", None)
    if isinstance(value, torch.Tensor):
        return type(value)
    if not operations.is_known(node) or not node.all_input_nodes:
        return None
    first = _type_of(node.all_input_nodes[0], root)
    if operations.takes_item(node) and node.target is not getattr and first is None:
        # One of several values: of torch's own operations these are tensors.
        source = node.all_input_nodes[0]
        return torch.Tensor if operations.is_known(source) and _is_operation(operations.name_of(source)) else None
    if getattr(node.target, "__module__", "") == "_operator":
        tensors = [_type_of(source, root) not in (None, object) for source in node.all_input_nodes]
        return torch.Tensor if any(tensors) else None
    return torch.Tensor if _gives_one_tensor(operations.name_of(node)) else None


def _type_of_module_value(module: nn.Module) -> type | None:
    several = isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.LSTMCell, nn.AdaptiveLogSoftmaxWithLoss))
    own = type(module).__module__.startswith("torch.nn.modules") and STATE not in module.__dict__
    return torch.Tensor if own and not several and not getattr(module, "return_indices", False) else None


def _schemas(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name, None)
    return [getattr(packet, overload)._schema for overload in packet.overloads()] if packet is not None else []


def _is_operation(name: str) -> bool:
    return bool(_schemas(name))


@functools.cache
def _gives_one_tensor(name: str) -> bool:
    """Whether the operation of this name gives one tensor, whatever it is called with."""
    found = [[str(value.type) for value in schema.returns] for schema in _schemas(name)]
    return bool(found) and all(values == ["Tensor"] for values in found)


@contextlib.contextmanager
def contents_kept(modules: Iterable[nn.Module]) -> Iterator[Callable[[], bool]]:
    """Leave the lists, dicts and sets that modules hold as attributes, and those inside of these, as they are.

    Gives a function that says whether one of them has changed meanwhile.
    """
    found: dict[int, tuple[Any, Any]] = {}

    def visit(value: Any) -> None:
        if type(value) not in (list, dict, set, tuple) or id(value) in found:
            return
        if type(value) is not tuple:
            found[id(value)] = value, value.copy()
        for inner in value.values() if isinstance(value, dict) else value:
            visit(inner)

    for module in modules:
        for name, value in module.__dict__.items():
            if not name.startswith("_"):
                visit(value)
    try:
        yield lambda: any(_differs(value, before) for value, before in found.values())
    finally:
        for value, before in found.values():
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)


def _differs(value: Any, before: Any) -> bool:
    """Whether a container holds other objects than it did."""
    if isinstance(value, dict):
        return value.keys() != before.keys() or any(value[key] is not item for key, item in before.items())
    if isinstance(value, set):
        return value != before
    return len(value) != len(before) or any(mine is not theirs for mine, theirs in zip(value, before, strict=True))


class Otherwise(MfxError):
    """A question of the model's Python has another answer in this call than in the graph; ``answers`` up to it."""

    def __init__(self, answers: tuple[bool, ...]) -> None:
        super().__init__(f"values are finite where they were not, or the reverse: {answers}")
        self.answers = answers


def answered(value: Any, answers: tuple[bool, ...]) -> None:
    """In a graph: the model's Python asked for the truth of ``value``, and got the last of ``answers``."""
    if not isinstance(value, FakeTensor) and bool(value) != answers[-1]:
        raise Otherwise((*answers[:-1], not answers[-1]))


def answer_if_finite(node: fx.Node) -> bool | None:
    """The truth of a value if all numbers are finite, where that is all it depends on."""
    name = getattr(node.target, "__name__", node.target)
    if name in ("isfinite", "isinf", "isnan"):
        return name == "isfinite"
    if name in ("all", "any", "bool", "logical_not") and len(node.all_input_nodes) == 1:
        inner = answer_if_finite(node.all_input_nodes[0])
        return not inner if inner is not None and name == "logical_not" else inner
    return None
