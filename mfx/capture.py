"""Capture: from a model and the form of a call to a graph, and to what the graph depends on.

1. The call's ``(args, kwargs)`` are flattened (:mod:`torch.utils._pytree`); tensors become placeholders,
   everything else is part of the :class:`Signature` and holds as it is.
2. :class:`mfx.tracer.Tracer` runs the model's own ``forward`` on symbolic values.  The graph is relative
   to the root module: parameters, buffers and modules are named, not held.
3. What the tracing read in passing and froze (the training flags, simple attributes and children of
   every module it entered, and of modules taken whole what a plan depends on) becomes :class:`Guards`; a graph
   is used only while its guards hold, so a mode or setting baked at capture time never leaks into a later
   call (M1).
4. Dead values are left out; whatever draws, writes or checks stays.

Known limits: module-level globals and class attributes are not guarded.  See :mod:`mfx.tracer`.
"""

from __future__ import annotations

import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from mfx import operations
from mfx.errors import CaptureError, InputTypeError
from mfx.tracer import Constant, Tracer

ADDED = "momentum_velocity"
"""The one child a momentumized model has beyond the original's: its learned velocities."""

_MISSING = object()
_OURS = (os.path.dirname(__file__), os.path.dirname(fx.__file__))
_PLANNED_BY = ("p", "dropout", "inplace")
"""The attributes of modules taken whole that a plan depends on (:mod:`mfx.operations`)."""
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)


class _TensorLeaf:
    """Stands for a tensor in a signature."""

    def __repr__(self) -> str:
        return "tensor"


TENSOR = _TensorLeaf()


@dataclass(frozen=True)
class Signature:
    """The form of a call: the tree of its arguments, with ``TENSOR`` where a tensor stands."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Signature, list[torch.Tensor]]:
        """The signature of a call, and its tensors in order."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]
        leaves = tuple(TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in flat)
        return Signature(leaves, spec), tensors

    @property
    def key(self) -> Any:
        """A hashable stand-in: values with their types; objects that cannot be hashed by identity."""
        return (self.spec, tuple(_leaf_key(leaf) for leaf in self.leaves))

    def fill(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with ``tensors`` put in."""
        remaining = iter(tensors)
        flat = [next(remaining) if leaf is TENSOR else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(flat, self.spec)


@dataclass(frozen=True)
class Guards:
    """What a graph froze.

    ``seen``: (module or None for the root, table, key, value) of attributes and children; ``parameters``: the
    names of the parameters of modules taken whole.
    """

    seen: tuple[tuple[nn.Module | None, str, str, Any], ...]
    parameters: tuple[tuple[nn.Module, tuple[str, ...]], ...]

    def hold(self, root: nn.Module) -> bool:
        """Whether everything is still as it was seen."""
        for module, table, key, value in self.seen:
            owner = root if module is None else module
            entries = owner.__dict__ if table == "" else owner.__dict__[table]
            now = entries.get(key, _MISSING)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        return all(_parameter_names(module) == names for module, names in self.parameters)


@dataclass(frozen=True)
class Capture:
    """A model's computation for one form of call.

    ``graph`` takes the call's tensors in order and returns the flat outputs; ``out_spec`` rebuilds the
    model's output from them.  ``entered`` are the modules, by path, whose calls became part of the graph.
    """

    graph: fx.Graph
    out_spec: pytree.TreeSpec
    guards: Guards
    signature: Signature
    entered: tuple[tuple[str, nn.Module], ...]

    @property
    def hooked(self) -> tuple[str, ...]:
        """The paths of the entered modules that have hooks now, none of which the graph runs."""
        return tuple(path for path, module in self.entered if _has_hooks(module))

    def inputs(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The values that the graph takes in this call."""
        return Signature.of(args, kwargs)[1]

    def call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any]) -> Any:
        """The model's output, where ``run(root, *inputs)`` computes the graph."""
        return pytree.tree_unflatten(run(root, *self.inputs(root, args, kwargs)), self.out_spec)


def default_signature(forward: Any) -> Signature:
    """The call in which each argument without a default is a tensor and the others keep theirs."""
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
    return Signature(tuple(flat), spec)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` (tensor, tuple or dict) as ``(args, kwargs)``."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    raise InputTypeError(
        f"example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments, "
        f"not {type(example_inputs).__name__}"
    )


def capture(
    model: nn.Module, forward: Any, signature: Signature, whole: Mapping[int, str] = MappingProxyType({})
) -> Capture:
    """Trace ``forward(model, ...)`` for calls of the form ``signature``."""
    specs: list[pytree.TreeSpec] = []

    def entry(root, *proxies):  # type: ignore[no-untyped-def]  # an annotation would show in the graph
        args, kwargs = signature.fill(list(proxies))
        flat, spec = pytree.tree_flatten(forward(root, *args, **kwargs))
        specs.append(spec)
        return flat

    count = sum(leaf is TENSOR for leaf in signature.leaves)
    tracer = Tracer(entry, _argument_names(forward, signature, count), whole)
    before = {module: dict(module.__dict__) for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            draws = _generator_states()
            graph = tracer.trace(model)
            _refuse_frozen_draws(draws)
        _refuse_written_constants(graph, model)
        _refuse_assignments(before, tracer)
    except CaptureError:
        raise
    except Exception as error:
        raise _explain(error, tracer, model) from error
    finally:
        _restore(before)
    drop_dead(graph, model)
    graph.lint()
    entered = tuple((path, module) for path, module in tracer.entered.items() if path)
    return Capture(graph, specs[0], _guards(tracer), signature, entered)


def _guards(tracer: Tracer) -> Guards:
    seen: list[tuple[nn.Module | None, str, str, Any]] = []
    for path, module in tracer.entered.items():
        owner = module if path else None
        simple = [(key, value) for key, value in module.__dict__.items() if isinstance(value, _SIMPLE)]
        seen += [(owner, "", key, value) for key, value in simple]
        children = [(key, child) for key, child in module._modules.items() if key != ADDED]
        seen += [(owner, "_modules", key, child) for key, child in children]
    whole = [inner for module in tracer.called.values() for inner in module.modules()]
    for module in whole:
        seen += [(module, "", key, module.__dict__[key]) for key in _PLANNED_BY if key in module.__dict__]
        seen += [(module, "_modules", key, child) for key, child in module._modules.items()]
    return Guards(tuple(seen), tuple((module, _parameter_names(module)) for module in whole))


def _parameter_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in module._parameters.items() if parameter is not None)


def drop_dead(graph: fx.Graph, root: nn.Module) -> None:
    """Leave out values that nobody uses and whose computation has no effect."""
    for node in reversed(list(graph.nodes)):
        if not node.users and operations.is_pure(node, root):
            graph.erase_node(node)


def _argument_names(forward: Any, signature: Signature, count: int) -> list[str]:
    parameters = list(inspect.signature(forward).parameters)[1:]
    simple = len(signature.leaves) <= len(parameters) and len(set(parameters)) == len(parameters)
    names = parameters if simple else []
    return [names[i] if i < len(names) else f"input_{i}" for i in range(count)]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _generator_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    drawn = numpy.random.get_state() if numpy is not None else (0, [0])
    return (python, drawn[2:], list(drawn[1])), torch.get_rng_state()


def _refuse_frozen_draws(before: tuple[Any, ...]) -> None:
    after = _generator_states()
    if before[0] != after[0]:
        raise CaptureError(
            "the model's forward draws from Python's or NumPy's random module, and a captured graph would freeze the "
            "draw: draw with torch instead, or keep that module out of the graph with modules="
        )
    if not torch.equal(before[1], after[1]):
        raise CaptureError(
            "the model's forward draws random numbers in a way that a captured graph would freeze "
            "(a module or function outside torch's factories): keep that module out of the graph with modules="
        )


def _refuse_written_constants(graph: fx.Graph, root: nn.Module) -> None:
    """A tensor made while tracing is one for all calls; a write to it would be seen by the next."""
    for node in graph.nodes:
        for owner in operations.writes(node, root):
            while (shared := operations.aliased(owner, root)) is not None:
                owner = shared
            if isinstance(owner.target, Constant):
                raise CaptureError(
                    f"the model's forward writes in place ({node}) to a tensor that it makes without regard to its "
                    "inputs, or that is no parameter or buffer; a captured graph would hold one for all calls. Make "
                    "it from an input (x.new_zeros(...), torch.zeros_like(x)), register it as a buffer, or take the "
                    "module whole with modules="
                )


def _refuse_assignments(before: dict[nn.Module, dict[str, Any]], tracer: Tracer) -> None:
    for path, module in tracer.entered.items():
        was = before[module]
        for key, value in module.__dict__.items():
            if was.get(key, _MISSING) is not value and not (key in was and _same(was[key], value)):
                raise CaptureError(
                    f"{type(module).__name__}.forward of module {path or '(root)'!r} sets self.{key}, which a "
                    "captured graph would not repeat: return the value instead, or take the module whole "
                    "with modules="
                )


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, _SIMPLE) and one == other


def _restore(before: dict[nn.Module, dict[str, Any]]) -> None:
    for module, attributes in before.items():
        now = module.__dict__
        if len(now) != len(attributes) or any(now.get(key) is not attributes[key] for key in attributes):
            now.clear()
            now.update(attributes)


def _explain(error: Exception, tracer: Tracer, model: nn.Module) -> CaptureError:
    """Name the module and the line where tracing stopped, and what can be done."""
    scope = tracer.failed_in or tracer.current
    module = tracer.entered.get(scope.path, model)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_OURS)]
    where = theirs[-1] if theirs else frames[-1]
    line = f"{where.filename}:{where.lineno}: {where.line}"
    whole = f"take the module whole with modules={scope.path!r}, or a module that holds it; " if scope.path else ""
    return CaptureError(
        f"symbolic tracing stopped in module {scope.path or '(root)'!r} ({type(module).__name__}) at\n"
        f"    {line}\n"
        f"    {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
        f"its Python depends on values that are known only at run time. Remedies: {whole}momentumize the parts that "
        "can be followed, each in its place (model.backbone = mfx.momentumize(model.backbone)); or rewrite that line "
        "so that it does not branch on tensors."
    )


def _leaf_key(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), id(leaf))
    return (type(leaf), leaf)
