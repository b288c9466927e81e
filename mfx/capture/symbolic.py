"""Symbolic capture: the model's own ``forward``, run on symbolic values.

1. The call's tensors become placeholders; the rest of its :class:`mfx.capture.call.Form` holds as it is.
2. :class:`mfx.capture.tracer.Tracer` runs ``forward``.  The graph is relative to the root module: parameters, buffers
   and modules are named, not held.
3. What the tracing read in passing becomes :class:`mfx.capture.frozen.Guards`.
4. Dead values are left out; whatever draws, writes or checks stays.
5. A number that another call has another value of becomes an input of a *general* capture.  It is used only if it is,
   operation by operation, what a capture for the new value alone is; where Python decides by the number, it is not.

Known limits: see :mod:`mfx.capture.tracer` and :mod:`mfx.capture.frozen`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from mfx.capture.call import Call, Form, call_form
from mfx.capture.captured import Captured, Run
from mfx.capture.frozen import (
    Guards,
    explain,
    generator_states,
    refuse_assignments,
    refuse_frozen_draws,
    refuse_written_constants,
    restore,
)
from mfx.capture.same import same_computation
from mfx.capture.tracer import Tracer
from mfx.errors import CaptureError
from mfx.graph.shapes import propagate_shapes
from mfx.graph.splice import drop_dead
from mfx.torch_versions import pytree

Named = Mapping[int, str]
"""The paths of modules to be taken whole, by their id."""


@dataclass(frozen=True, eq=False)
class SymbolicCapture:
    """A model's computation for calls of one form; a :class:`mfx.capture.captured.Captured`.

    ``graph`` takes the call's inputs in order and returns the flat outputs; ``out_spec`` rebuilds the model's output
    from them.  ``entered`` are the modules, by path, whose calls became part of the graph; ``forms`` those of the calls
    of momentumized modules in it.
    """

    graph: fx.Graph
    form: Form
    grad: bool
    guards: Guards
    out_spec: pytree.TreeSpec
    entered: tuple[tuple[str, nn.Module], ...]
    calls: Mapping[str, int] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    sizes: Mapping[fx.Node, int] = field(default_factory=dict)

    @property
    def hooked(self) -> tuple[str, ...]:
        """The paths of the entered modules that have hooks now, none of which the graph runs."""
        return tuple(path for path, module in self.entered if _has_hooks(module))

    def holds(self, root: nn.Module, call: Call) -> bool:
        """Whether the call is of this form, under the same grad mode, and what was frozen is as it was."""
        return self.grad == torch.is_grad_enabled() and self.form.fits(call) and self.guards.hold(root)

    def inputs(self, root: nn.Module, call: Call) -> list[Any]:
        """The call's tensors, and its numbers that vary."""
        return self.form.inputs(call)

    def call(self, root: nn.Module, call: Call, run: Run) -> Any:
        """The model's output, where ``run(root, *inputs)`` computes the graph."""
        return pytree.tree_unflatten(run(root, *self.form.inputs(call)), self.out_spec)


def capture_symbolic(
    model: nn.Module, forward: Any, form: Form, named: Named = MappingProxyType({})
) -> SymbolicCapture:
    """Trace ``forward(model, ...)`` for calls of ``form``.

    Args:
        model: the module whose ``forward`` is captured; it is left as it is.
        forward: the function.
        form: of the calls.
        named: modules whose calls are left as one node and marked.

    Raises:
        CaptureError: the model's Python cannot be followed; says where and why.
    """
    specs: list[pytree.TreeSpec] = []

    def entry(root, *proxies):  # type: ignore[no-untyped-def]  # an annotation would show in the graph
        args, kwargs = form.fill(proxies)
        flat, spec = pytree.tree_flatten(forward(root, *args, **kwargs))
        specs.append(spec)
        return flat

    tracer = Tracer(entry, _argument_names(forward, form), form.kinds(), named)
    graph = _trace(tracer, model)
    drop_dead(graph, model)
    graph.lint()
    entered = tuple((path, module) for path, module in tracer.entered.items() if path)
    forms = {path: call_form(args, kwargs) for path, (args, kwargs) in tracer.momentumized.items()}
    guards = Guards.of(tracer)
    return SymbolicCapture(graph, form, torch.is_grad_enabled(), guards, specs[0], entered, tracer.calls, forms)


def with_sizes(captured: SymbolicCapture, model: nn.Module, call: Call) -> SymbolicCapture:
    """The capture with shapes noted on its graph and sizes measured, for the inputs of ``call``."""
    return replace(captured, sizes=propagate_shapes(captured.graph, model, captured.form.inputs(call)))


def varied(known: Iterable[Captured], model: nn.Module, call: Call) -> tuple[int, ...]:
    """The places of the numbers that are all by which ``call`` differs from one of the captures so far; none else."""
    for captured in known:
        if isinstance(captured, SymbolicCapture) and captured.grad == torch.is_grad_enabled():
            places = captured.form.varied(call)
            if places and captured.guards.hold(model):
                return (*captured.form.numbers(), *places)
    return ()


def capture_general(
    model: nn.Module, forward: Any, call: Call, places: tuple[int, ...], named: Named
) -> SymbolicCapture | None:
    """A capture for ``call`` with any number at ``places``; None where Python decides by these numbers.

    Args:
        model, forward, named: as for :func:`capture_symbolic`.
        call: a call.
        places: of its leaves, those to be inputs.
    """
    form = call.form.with_inputs(places)
    try:
        general = capture_symbolic(model, forward, form, named)
    except CaptureError:
        return None
    alone = capture_symbolic(model, forward, call.form, named)
    return general if same_computation(general.graph, alone.graph, form.inputs(call)) else None


def _trace(tracer: Tracer, model: nn.Module) -> fx.Graph:
    """Run the tracer, and refuse what it would have frozen or lost."""
    before = {module: dict(module.__dict__) for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            draws = generator_states()
            graph = tracer.trace(model)
            refuse_frozen_draws(draws)
        refuse_written_constants(graph, model)
        refuse_assignments(before, tracer)
        return graph
    except CaptureError:
        raise
    except Exception as error:
        raise explain(error, tracer, model) from error
    finally:
        restore(before)


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
