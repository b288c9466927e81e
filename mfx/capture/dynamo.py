"""Dynamo capture: a graph of models whose Python no symbolic tracer can follow; nothing is compiled.

1. ``fullgraph_capture`` evaluates the model's own ``forward`` symbolically, bytecode by bytecode, and gives one graph
   of torch operations whose parameters are placeholders; where it would need two, the model is refused.
2. Each placeholder is looked up by evaluating Dynamo's name for it: what is a parameter or buffer of the model
   becomes ``get_attr``, so the graph is relative to the root module and owns nothing, like one of
   :mod:`mfx.capture.tracer`; what remains (tensors of the call, of caches, sizes) stays a placeholder.
3. A call runs the bytecode that Dynamo wrote around the graph: it reads the inputs, calls the (rewritten) graph,
   rebuilds the output and repeats side effects, such as the filling of a cache.
4. Dynamo's own guards say for which calls and settings a capture holds.
5. Within ``torch.export`` it stands aside of what is recorded (:mod:`mfx.capture.exported`).

Attention's inference fast path is off meanwhile: it swallows whole layers, adds and all, only where gradients are off.

Source: torch/_dynamo/convert_frame.py, which has the same functions in torch 2.11 and 2.15.
Known limits: guards do not see all that a forward could look at (module-level state of other libraries); torch
2.11 does not see ``requires_grad`` of a parameter change, which therefore nothing here depends on.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from mfx.capture.call import Call, Run
from mfx.capture.exported import Sizes, beside_export, is_exporting
from mfx.capture.frozen import generators_kept
from mfx.capture.lifted import mark, note_modes, note_shape, relative
from mfx.capture.named import recording, sharded_within
from mfx.errors import CaptureError
from mfx.graph.splice import drop_dead
from mfx.sharding import unsharded, whole_parameters
from mfx.torch_versions import dynamo, source_name, source_of

_LOGGING = "debug info warning warn error log critical exception warning_once info_once warning_advice".split()


class _Capturing:
    on = False


capturing = _Capturing()
"""``on`` while Dynamo captures here, or looks whether a capture holds: Python that it follows may ask."""


@dataclass(frozen=True, eq=False)
class DynamoCapture:
    """A model's computation for the calls that its guards let through; a :class:`mfx.capture.call.Captured`.

    ``graph`` takes the values named by ``taken`` among those that the bytecode gives, and returns what the bytecode
    expects.
    """

    graph: fx.Graph
    taken: tuple[int, ...]
    forward: Any
    manager: Any = field(repr=False)
    replay: Run = field(repr=False)
    running: list[Run] = field(repr=False)
    calls: Mapping[str, int] = field(default_factory=dict)
    hooked: tuple[str, ...] = ()
    sizes: Mapping[fx.Node, int] = field(default_factory=dict)
    taken_for_granted: Sizes | None = None

    def holds(self, root: nn.Module, call: Call) -> bool:
        """Whether the capture is one of this call, in the modes and settings of now."""
        with _slow_path():
            return bool(self.manager.guard_manager.check(_frame(root, self.forward, call).locals))

    def call(self, root: nn.Module, call: Call, run: Run) -> Any:
        """The model's output, where ``run(root, *inputs)`` computes the graph."""

        def taking(*values: Any) -> Any:
            if self.taken_for_granted is not None:
                self.taken_for_granted.require(values)
            return run(root, *(values[index] for index in self.taken))

        self.running.append(taking)
        try:
            return self.replay(root, *call.args, **call.kwargs)
        finally:
            self.running.pop()

    def inputs(self, root: nn.Module, call: Call) -> list[Any]:
        """The values that the graph takes in this call."""

        def stop(_: nn.Module, *values: Any) -> Any:
            raise _Inputs(list(values))

        try:
            self.call(root, call, stop)
        except _Inputs as found:
            return found.values
        raise AssertionError("the bytecode of a capture did not call its graph")


class _Inputs(Exception):
    """Carries the values that a graph takes out of the bytecode."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self.values = values


def capture_dynamo(
    root: nn.Module,
    forward: Any,
    call: Call,
    named: Mapping[int, str],
    called: Mapping[int, str] = types.MappingProxyType({}),
) -> DynamoCapture:
    """Capture ``forward(root, ...)``; see :func:`_captured`."""
    with beside_export(call) as stand_in:
        return _captured(root, forward, stand_in, named, called)


def _captured(
    root: nn.Module, forward: Any, call: Call, named: Mapping[int, str], called: Mapping[int, str]
) -> DynamoCapture:
    """Capture ``forward(root, ...)``.

    Args:
        root: the module whose ``forward`` is captured; it is left as it is.
        forward: the function.
        call: a call to capture it for.
        named: the paths of modules whose calls are to be marked (:mod:`mfx.capture.named`), by their id.
        called: the paths of those whose calls are to be one node each, by their id.

    Raises:
        CaptureError: the model does not give one graph; says where and why.
    """
    torch_dynamo = dynamo()
    pass_by_masks(root)
    frame = _frame(root, forward, call)
    bound = types.MethodType(forward, root)
    # The patch has to lie inside the metrics context, which torch 2.11 would else try to write it to.
    with (
        _slow_path(),
        generators_kept(),
        torch_dynamo.get_metrics_context(),
        torch_dynamo.dynamo_timed("mfx"),
        _settings(),
    ):
        try:
            with recording(named, {**called, **sharded_within(root, named)}), unsharded(root), whole_parameters(root):
                output = torch_dynamo.fullgraph_capture(bound, call.args, call.kwargs)
                gm = output.backend_input.graph_module if output.backend_input is not None else None
                if gm is None:
                    raise CaptureError(f"{type(root).__name__}.forward runs no torch operation in this call")
                manager = output.graph_capture_output.build_guards(frame.code)
                kinds, calls = _mark(gm, output, root, frame)
        except CaptureError:
            raise
        except Exception as error:
            raise _explain(error, root) from error
    placeholders = gm.graph.find_nodes(op="placeholder")
    granted = Sizes.of(placeholders, output.graph_capture_output.output_graph.shape_env) if is_exporting() else None
    graph, taken = relative(gm, kinds)
    drop_dead(graph, root)
    graph.lint()
    running: list[Run] = []
    # Dynamo's bytecode runs with globals of its own; in torch 2.11 they lack the builtins it refers to.
    scope = {**vars(builtins), **output.graph_capture_output.f_globals}
    replay = output.forward_callable(compiled_fn=lambda *values: running[-1](*values), extra_globals=scope)
    return DynamoCapture(graph, taken, forward, manager, replay, running, calls, taken_for_granted=granted)


def _frame(root: nn.Module, forward: Any, call: Call) -> Any:
    """The frame in which Python would start the call."""
    try:
        return dynamo()._get_frame(types.MethodType(forward, root), call.args, call.kwargs)
    except TypeError:
        forward(root, *call.args, **call.kwargs)  # arguments that do not fit: Python says so in its own words
        raise


def _mark(
    gm: fx.GraphModule, output: Any, root: nn.Module, frame: Any
) -> tuple[dict[fx.Node, tuple[str, str]], dict[str, int]]:
    """Note on the nodes what planning needs.

    Gives kind and path of the placeholders that are the model's own, and how often each module ran.
    """
    owned = {id(tensor): ("buffer", path) for path, tensor in reversed(list(root.named_buffers()))}
    owned.update({id(tensor): ("parameter", path) for path, tensor in reversed(list(root.named_parameters()))})
    known = output.graph_capture_output.output_graph.export_metadata.graph_input_idx_to_local_source
    scope = {**dynamo()._get_closure_vars(), "L": frame.locals, "G": frame.globals}
    kinds: dict[fx.Node, tuple[str, str]] = {}
    lifted: dict[fx.Node, str] = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        source = source_of(node) or known.get(index)
        value = _evaluate(source, scope)
        if id(value) in owned:
            kinds[node] = owned[id(value)]
            lifted[node] = kinds[node][0]
        elif isinstance(value, (int, float)) or not isinstance(node.meta.get("example_value"), torch.Tensor):
            lifted[node] = "number"  # a float that varied, of a module or the call, is a tensor of no dimensions here
    calls = mark(gm.graph, lifted, {id(module): path for path, module in root.named_modules()})
    note_modes(gm.graph)
    for node in gm.graph.nodes:
        note_shape(node)
    return kinds, calls


def _evaluate(source: Any, scope: dict[str, Any]) -> Any:
    """What Dynamo's name for a graph input stands for; names are expressions over the frame."""
    try:
        return eval(source_name(source), scope) if source is not None else None
    except Exception:
        return None


@contextlib.contextmanager
def _slow_path() -> Iterator[None]:
    """Attention as its parts, whether gradients are on or off; and :data:`capturing` on."""
    before, outer = torch.backends.mha.get_fastpath_enabled(), capturing.on
    torch.backends.mha.set_fastpath_enabled(False)
    capturing.on = True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        capturing.on = outer


def _settings() -> Any:
    """Log calls are passed by, since each would break the graph, and so would an RNN; guards see hooks added later."""
    config = dynamo().config
    classes = {logging.Logger, logging.getLoggerClass()}
    calls = {getattr(kind, name, None) for kind in classes for name in _LOGGING} - {None}
    ignored = {*config.ignore_logging_functions, *calls, warnings.warn}
    return config.patch(ignore_logging_functions=ignored, skip_nnmodule_hook_guards=False, allow_rnn=True)


def pass_by_masks(root: nn.Module) -> None:
    """Let Dynamo pass by nn.Transformer's look at a mask's values; its result is a hint, and "no" is always right."""
    from torch.nn.modules import transformer

    stacks = (transformer.TransformerEncoder, transformer.TransformerDecoder)
    global _taught
    if _taught or not any(isinstance(module, stacks) for module in root.modules()):
        return

    @torch.compiler.substitute_in_graph(transformer._detect_is_causal_mask, skip_signature_check=True)
    def _detect_is_causal_mask(mask: Any, is_causal: Any = None, size: Any = None) -> bool:
        return is_causal is True

    _taught = True


_taught = False


def _explain(error: Exception, root: nn.Module) -> CaptureError:
    """Where the model's Python cannot be part of one graph, and why, in a few lines."""
    text, _, code = str(error).partition("from user code:")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wanted = [line for line in lines[1:] if line.startswith(("Explanation:", "Hint:"))][:2]
    frames = [line.strip() for line in code.splitlines() if line.strip()]
    places = [index for index, line in enumerate(frames) if line.startswith("File ")]
    where = frames[places[-1] : places[-1] + 2] if places else []
    shown = "\n    ".join([f"{type(error).__name__}: {lines[0] if lines else ''}", *wanted, *where])
    return CaptureError(
        f"Dynamo cannot take {type(root).__name__}.forward into one graph:\n    {shown}\n"
        "The model has to be one graph: a break inside a chain would change the function that it computes. Rewrite "
        "that line, or switch off the setting that needs it; or have blocks that keep x's shape run as "
        "mfx.MomentumNet(blocks, gamma, is_residual=False, use_backprop=False)(x, ...), which follows no Python"
    )
