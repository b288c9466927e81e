"""Call: what a model is called with, the form of that, and what a capture of it gives (:class:`Captured`).

A call's ``(args, kwargs)`` are a tree (torch/utils/_pytree.py) with leaves.  Tensors are inputs of a captured graph;
every other leaf is part of the call's :class:`Form`, and holds as it is, but for numbers that have been seen to vary:
these become inputs as well.
"""

from __future__ import annotations

import enum
import inspect
import numbers
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence

from mfx.errors import CaptureError, InputTypeError
from mfx.torch_versions import children_of, pytree


class Input:
    """Stands, in a form, for a leaf that a graph takes as an input."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return self.kind.__name__.lower()


TENSOR = Input(torch.Tensor)
_NUMBERS = {int: Input(int), float: Input(float)}


@dataclass(frozen=True)
class Form:
    """The form of a call: the tree of its arguments, with an input's mark where a tensor or varying number stands."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    def fits(self, call: Call) -> bool:
        """Whether ``call`` is of this form."""
        if len(call.leaves) != len(self.leaves) or call.spec != self.spec:
            return False
        return all(_same(mine, theirs) for mine, theirs in zip(self.leaves, call.leaves, strict=True))

    def inputs(self, call: Call) -> list[Any]:
        """The leaves of a call that a graph of this form takes, in order."""
        pairs = zip(self.leaves, call.leaves, strict=True)
        return [leaf for mine, leaf in pairs if isinstance(mine, Input)]

    def fill(self, inputs: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The ``(args, kwargs)`` with ``inputs`` put in."""
        remaining = iter(inputs)
        flat = [next(remaining) if isinstance(leaf, Input) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(flat, self.spec)

    def kinds(self) -> list[type]:
        """The types of the inputs, in order."""
        return [leaf.kind for leaf in self.leaves if isinstance(leaf, Input)]

    def varied(self, call: Call) -> tuple[int, ...]:
        """The places at which ``call`` has another number, where that is all the difference; none elsewhere."""
        if len(call.leaves) != len(self.leaves) or call.spec != self.spec:
            return ()
        pairs = enumerate(zip(self.leaves, call.leaves, strict=True))
        other = [(place, mine, theirs) for place, (mine, theirs) in pairs if not _same(mine, theirs)]
        numbers = all(type(mine) is type(theirs) and type(mine) in _NUMBERS for _, mine, theirs in other)
        return tuple(place for place, _, _ in other) if numbers else ()

    def numbers(self) -> tuple[int, ...]:
        """The places of the numbers that are inputs."""
        return tuple(place for place, leaf in enumerate(self.leaves) if isinstance(leaf, Input) and leaf is not TENSOR)

    def with_inputs(self, places: Iterable[int]) -> Form:
        """The form with the numbers at ``places`` as inputs."""
        chosen = set(places)
        leaves = (_NUMBERS[type(leaf)] if place in chosen else leaf for place, leaf in enumerate(self.leaves))
        return Form(tuple(leaves), self.spec)


@dataclass(frozen=True)
class Call:
    """``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def _flat(self) -> tuple[list[Any], pytree.TreeSpec]:
        return pytree.tree_flatten((self.args, self.kwargs))

    @property
    def leaves(self) -> list[Any]:
        """The leaves of the arguments, in order."""
        return self._flat[0]

    @property
    def spec(self) -> pytree.TreeSpec:
        """The tree that they are the leaves of."""
        return self._flat[1]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among them."""
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    @property
    def form(self) -> Form:
        """The form in which only tensors are inputs."""
        return Form(tuple(TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves), self.spec)


Run = Callable[..., Any]


class Captured(Protocol):
    """A model's computation for some of its calls.

    ``graph`` is relative to the root module (parameters, buffers and modules by path) and carries the notes of
    :mod:`mfx.graph.notes`; ``sizes`` are the bytes that its nodes keep for backward, as far as they were measured;
    ``hooked`` the paths of modules whose hooks the graph does not run; ``calls`` how often the forward of each module
    that became part of the graph ran, by path.
    """

    @property
    def graph(self) -> fx.Graph: ...

    @property
    def sizes(self) -> Mapping[fx.Node, int]: ...

    @property
    def calls(self) -> Mapping[str, int]: ...

    @property
    def hooked(self) -> tuple[str, ...]: ...

    def holds(self, root: nn.Module, call: Call) -> bool:
        """Whether this is a capture of ``call``, in the modes and settings of now."""
        ...

    def inputs(self, root: nn.Module, call: Call) -> list[Any]:
        """The values that the graph takes in ``call``."""
        ...

    def call(self, root: nn.Module, call: Call, run: Run) -> Any:
        """The model's output in ``call``, where ``run(root, *inputs)`` computes the graph."""
        ...


def as_call(example_inputs: Any) -> Call:
    """``example_inputs`` (tensor, tuple or dict) as a call."""
    if isinstance(example_inputs, torch.Tensor):
        return Call((example_inputs,), {})
    if isinstance(example_inputs, (tuple, list)):
        return Call(tuple(example_inputs), {})
    if isinstance(example_inputs, dict):
        return Call((), dict(example_inputs))
    raise InputTypeError(
        f"example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments, "
        f"not {type(example_inputs).__name__}"
    )


def call_form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
    """The form of a call with symbolic values in it, which stand for tensors."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    return Form(tuple(TENSOR if isinstance(leaf, fx.Proxy) else leaf for leaf in flat), spec)


def default_form(forward: Any) -> Form:
    """The form in which each argument without a default is a tensor and the others keep theirs."""
    args, kwargs = [], {}
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if parameter.default is not inspect.Parameter.empty:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = TENSOR
        else:
            args.append(TENSOR)
    if not args and not kwargs:
        raise CaptureError(
            f"cannot tell how {forward.__qualname__}{inspect.signature(forward)} is called: "
            "pass example_inputs= as its forward takes them"
        )
    flat, spec = pytree.tree_flatten((tuple(args), kwargs))
    return Form(tuple(flat), spec)


def _same(mine: Any, theirs: Any) -> bool:
    """Whether a call's leaf is what a form has; objects that cannot be compared by value are by identity."""
    if isinstance(mine, Input):
        return isinstance(theirs, torch.Tensor) if mine is TENSOR else type(theirs) is mine.kind
    if isinstance(theirs, torch.Tensor) or type(mine) is not type(theirs):
        return False
    if isinstance(mine, float):
        return mine.hex() == theirs.hex()  # tells -0.0 from 0.0, and finds NaN again
    try:
        hash(mine)
    except TypeError:
        return mine is theirs
    return bool(mine == theirs)


_PLAIN = (numbers.Number, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout)
_PLAIN = (*_PLAIN, torch.memory_format, torch.Generator, enum.Enum, type, types.BuiltinFunctionType, Input)
"""Arguments of these types are what they are, or (a generator) looked at by torch alone."""


def refuse_objects(forward: Any, form: Form) -> None:
    """An object among the arguments may hold other tensors the next time, and a graph would hold the first ones."""
    for name, spec, leaves in _arguments(forward, form.leaves, form.spec):
        if _holds(spec, PackedSequence):
            raise CaptureError(
                f"the argument {name!r} is, or holds, a torch.nn.utils.rnn.PackedSequence, which looks at its values "
                "when it is made, and a symbolically captured graph has none: let Dynamo follow it (capture='dynamo' "
                "or 'auto', with example_inputs=), or momentumize the part that its packed.data goes through"
            )
        for leaf in leaves:
            if not _is_plain(leaf):
                raise CaptureError(
                    f"the argument {name!r} holds a {type(leaf).__module__}.{type(leaf).__qualname__}, and a "
                    "symbolically captured graph would hold what is in it now for good: pass tensors, numbers, "
                    "strings and containers of them, or let Dynamo follow the object (capture='dynamo' or 'auto')"
                )


def refuse_strided(forward: Any, call: Call) -> None:
    """A nested tensor of the older layout has no shape that could be asked for."""
    if not any(tensor.is_nested and tensor.layout != torch.jagged for tensor in call.tensors):
        return
    for name, _, leaves in _arguments(forward, call.leaves, call.spec):
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.is_nested and leaf.layout != torch.jagged:
                raise InputTypeError(
                    f"the argument {name!r} holds a nested tensor of layout {leaf.layout}, which torch's own captures "
                    "cannot follow: make it with layout=torch.jagged, or pad it (torch.nested.to_padded_tensor)"
                )


Argument = tuple[pytree.TreeSpec, list[Any]]
"""The tree of an argument and the leaves in it."""


def _arguments(
    forward: Any, leaves: Iterable[Any], spec: pytree.TreeSpec
) -> Iterator[tuple[str, pytree.TreeSpec, list[Any]]]:
    """Each argument by name.  No container is built: a constructor may look at the values."""
    given = iter(leaves)

    def taken(branch: pytree.TreeSpec) -> list[Argument]:
        return [(child, list(islice(given, child.num_leaves))) for child in children_of(branch)]

    positional, keyed = children_of(spec)
    args, kwargs = taken(positional), dict(zip(keyed.context, taken(keyed), strict=True))
    try:
        bound = inspect.signature(forward).bind(None, *args, **kwargs)
    except TypeError:
        yield from ((f"input {place}", *value) for place, value in enumerate((*args, *kwargs.values())))
        return
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    for name, value in list(bound.arguments.items())[1:]:
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            yield from ((name, *each) for each in value)
        elif kinds[name] is inspect.Parameter.VAR_KEYWORD:
            yield from ((key, *each) for key, each in value.items())
        else:
            yield (name, *value)


def _holds(spec: pytree.TreeSpec, container: type) -> bool:
    """Whether a container of this class is in a tree."""
    inside = not spec.is_leaf() and any(_holds(child, container) for child in children_of(spec))
    return inside or spec.context is container


def _is_plain(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None and not value.__dict__
    if isinstance(value, slice):
        return all(map(_is_plain, (value.start, value.stop, value.step)))
    if isinstance(value, (range, torch.Size)):
        return True
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_plain, value))
    if is_dataclass(value) and not isinstance(value, type):
        frozen = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return frozen and all(_is_plain(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, _PLAIN)
