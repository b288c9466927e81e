"""Symbolic capture: the model's own ``forward``, run on symbolic values.

1. The call's tensors become placeholders; the rest of its :class:`mfx.capture.call.Form` holds as it is.
2. :class:`mfx.capture.tracer.Tracer` runs ``forward``.  The graph is relative to the root module: parameters, buffers
   and modules are named, not held.
3. What the tracing read in passing becomes :class:`mfx.capture.frozen.Guards`.
4. Dead values are left out; whatever draws, writes or checks stays.
5. Arguments that are neither tensors nor plain values are refused: what an object holds would be frozen in.
6. A number that another call has another value of becomes an input of a *general* capture.  It is used only if it is,
   operation by operation, what a capture for the new value alone is; where Python decides by the number, it is not.

Known limits: see :mod:`mfx.capture.tracer` and :mod:`mfx.capture.frozen`.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from mfx.capture.call import Call, Captured, Form, Run, call_form, refuse_objects
from mfx.capture.frozen import (
    Guards,
    explain,
    generator_states,
    modes_kept,
    refuse_assignments,
    refuse_frozen_draws,
    refuse_written_constants,
    remembered,
    restore,
)
from mfx.capture.tracer import Constant, Tracer
from mfx.capture.values import Applied, contents_kept
from mfx.errors import CaptureError
from mfx.graph.notes import MODES, SCOPE, Modes
from mfx.graph.shapes import propagate_shapes
from mfx.graph.splice import drop_dead
from mfx.memory import only_new_garbage
from mfx.torch_versions import pytree

Named = Mapping[int, str]
"""The paths of modules to be taken whole, by their id."""


@dataclass(frozen=True, eq=False)
class SymbolicCapture:
    """A model's computation for calls of one form; a :class:`mfx.capture.call.Captured`.

    ``graph`` takes the call's inputs in order and returns the flat outputs; ``out_spec`` rebuilds the model's output
    from them.  ``modes`` are those in which it is called, ``entered`` the modules, by path, whose calls became part of
    the graph; ``forms`` those of the calls of momentumized modules in it.
    """

    graph: fx.Graph
    form: Form
    modes: Modes
    guards: Guards
    out_spec: pytree.TreeSpec
    entered: tuple[tuple[str, nn.Module], ...]
    calls: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    sizes: Mapping[fx.Node, int] = field(default_factory=dict)
    answers: tuple[bool, ...] | None = None

    @property
    def hooked(self) -> tuple[str, ...]:
        """The paths of the entered modules that have hooks now, none of which the graph runs."""
        return tuple(path for path, module in self.entered if _has_hooks(module))

    def holds(self, root: nn.Module, call: Call) -> bool:
        """Whether the call is of this form, in the same grad mode and autocast, and what was frozen is as it was."""
        return self.modes == Modes.current() and self.form.fits(call) and self.guards.hold(root)

    def inputs(self, root: nn.Module, call: Call) -> list[Any]:
        """The call's tensors, and its numbers that vary."""
        return self.form.inputs(call)

    def call(self, root: nn.Module, call: Call, run: Run) -> Any:
        """The model's output, where ``run(root, *inputs)`` computes the graph."""
        return pytree.tree_unflatten(run(root, *self.form.inputs(call)), self.out_spec)


def capture_symbolic(
    model: nn.Module,
    forward: Any,
    form: Form,
    named: Named = MappingProxyType({}),
    called: Collection[int] = (),
    held: Callable[[], Iterable[Any]] = tuple,
    answers: tuple[bool, ...] | None = None,
) -> SymbolicCapture:
    """Trace ``forward(model, ...)`` for calls of ``form``.

    Args:
        model: the module whose ``forward`` is captured; it is left as it is.
        forward: the function.
        form: of the calls.
        named: modules whose calls are left as one node and marked.
        called: the ids of others whose calls are left as one node.
        held: gives the values that the caller has noted by then.
        answers: see :class:`mfx.capture.tracer.Tracer`.

    Raises:
        CaptureError: the model's Python cannot be followed; says where and why.
    """
    specs: list[pytree.TreeSpec] = []

    def entry(root, *proxies):  # type: ignore[no-untyped-def]  # an annotation would show in the graph
        args, kwargs = form.fill(proxies)
        flat, spec = pytree.tree_flatten(forward(root, *args, **kwargs))
        specs.append(spec)
        return flat

    refuse_objects(forward, form)
    tracer = Tracer(entry, _argument_names(forward, form), form.kinds(), named)
    tracer.called_only = called
    tracer.answers = answers
    with only_new_garbage():
        graph = _trace(tracer, model)
        _refuse_left(tracer, model, held)
    drop_dead(graph, model)
    graph.lint()
    entered = tuple((path, module) for path, module in tracer.entered.items() if path)
    forms = {path: call_form(args, kwargs) for path, (args, kwargs) in tracer.momentumized.items()}
    guards = Guards.of(tracer)
    modes = Modes.current()
    return SymbolicCapture(graph, form, modes, guards, specs[0], entered, tracer.calls, forms, answers=answers)


def with_sizes(captured: SymbolicCapture, model: nn.Module, call: Call) -> SymbolicCapture:
    """The capture with shapes noted on its graph and sizes measured, for the inputs of ``call``."""
    return replace(captured, sizes=propagate_shapes(captured.graph, model, captured.form.inputs(call)))


def varied(known: Iterable[Captured], model: nn.Module, call: Call) -> tuple[int, ...]:
    """The places of the numbers that are all by which ``call`` differs from one of the captures so far; none else."""
    for captured in known:
        if isinstance(captured, SymbolicCapture) and captured.modes == Modes.current():
            places = captured.form.varied(call)
            if places and captured.guards.hold(model):
                return (*captured.form.numbers(), *places)
    return ()


def capture_general(
    model: nn.Module, forward: Any, call: Call, places: tuple[int, ...], named: Named, called: Collection[int] = ()
) -> SymbolicCapture | None:
    """A capture for ``call`` with any number at ``places``; None where Python decides by these numbers.

    Args:
        model, forward, named, called: as for :func:`capture_symbolic`.
        call: a call.
        places: of its leaves, those to be inputs.
    """
    form = call.form.with_inputs(places)
    try:
        general = capture_symbolic(model, forward, form, named, called)
    except CaptureError:
        return None
    alone = capture_symbolic(model, forward, call.form, named, called)
    return general if same_computation(general.graph, alone.graph, form.inputs(call)) else None


def _trace(tracer: Tracer, model: nn.Module) -> fx.Graph:
    """Run the tracer, and refuse what it would have frozen or lost."""
    before = remembered(model)
    try:
        with torch.random.fork_rng(devices=[]), contents_kept(before) as changed:
            draws = generator_states()
            with modes_kept(model):
                graph = tracer.trace(model)
            refuse_frozen_draws(draws)
            if changed():
                raise CaptureError(
                    f"the forward of {type(model).__name__}, or of a module in it, changes a list, dict or set that it "
                    "keeps as an attribute, which a captured graph would not repeat: return the value instead, or take "
                    "the module whole with modules="
                )
        refuse_written_constants(graph, model)
        refuse_assignments(before, tracer)
        return graph
    except CaptureError:
        raise
    except Exception as error:
        raise explain(error, tracer, model) from error
    finally:
        restore(before)


def _refuse_left(tracer: Tracer, model: nn.Module, held: Callable[[], Iterable[Any]]) -> None:
    """Refuse what the model's Python keeps elsewhere than in its modules: the graph would not."""
    if tracer.left(held()) is None:
        return
    gc.collect()  # torch's own ``a, b = value`` leaves a cycle
    node = tracer.left(held())
    if node is not None:
        raise CaptureError(
            f"the forward of {type(model).__name__}, or of a module in it, keeps {node.name!r} (of module "
            f"{node.meta[SCOPE].path or '(root)'!r}) in a global, a closure or an object outside of the model, which a "
            "captured graph would not repeat: return the value instead, or keep it as an attribute of a module that is "
            "taken whole with modules="
        )


def _argument_names(forward: Any, form: Form) -> list[str]:
    """A name for each input: its argument's, where arguments are single values."""
    parameters = list(inspect.signature(forward).parameters)[1:]
    simple = len(form.leaves) <= len(parameters) and len(set(parameters)) == len(parameters)
    names: Sequence[str] = parameters if simple else ()
    return [names[i] if i < len(names) else f"input_{i}" for i in range(len(form.kinds()))]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


_FAILED = object()


def same_computation(general: fx.Graph, alone: fx.Graph, inputs: Sequence[Any]) -> bool:
    """Whether ``general``, called with ``inputs``, runs the operations of ``alone``, one by one.

    What ``general`` computes from numbers alone is computed here; all else must be the same operation on the same
    values, in the same order.
    """
    remaining = iter(alone.nodes)
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in general.nodes:
        if node.op == "placeholder":
            value = next(given)
            if not isinstance(value, torch.Tensor):
                values[node] = value
                continue
        elif node.all_input_nodes and all(_is_plain(values.get(source, node)) for source in node.all_input_nodes):
            values[node] = _computed(node, values)
            if values[node] is not _FAILED:
                continue
        other = next(remaining, None)
        if other is None or not _same_node(node, other, values):
            return False
        values[node] = other
    return next(remaining, None) is None


def _is_plain(value: Any) -> bool:
    return not isinstance(value, fx.Node)


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of an operation on numbers."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != "_operator":
        return _FAILED
    args = map_arg(node.args, values.__getitem__)
    try:
        return node.target(*args)  # type: ignore[operator,misc]
    except (ArithmeticError, TypeError, ValueError):
        return _FAILED


def _same_node(node: fx.Node, other: fx.Node, values: dict[fx.Node, Any]) -> bool:
    if node.op != other.op or node.meta[MODES] != other.meta[MODES] or not _same_target(node.target, other.target):
        return False
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return node.op == "placeholder" or repr((args, kwargs)) == repr((other.args, other.kwargs))


def _same_target(one: Any, other: Any) -> bool:
    if isinstance(one, Constant) and isinstance(other, Constant):
        if not isinstance(one.value, torch.Tensor) or not isinstance(other.value, torch.Tensor):
            return one.value is other.value
        return one.value.dtype == other.value.dtype and torch.equal(one.value, other.value)
    if isinstance(one, Applied) and isinstance(other, Applied):
        return (one.function, one.spec, one.held) == (other.function, other.spec, other.held)
    return one == other
