"""torch, as far as mfx uses what torch does not promise: every private name, and what differs between versions.

mfx runs on torch 2.11 to 2.15.  A private name that is gone is reported here, once, with the version; a test lists all
names of this file, so that a new one is a decision.  Dynamo takes a second to import, so its names are looked up when
they are first needed (:func:`dynamo`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

try:
    from torch._compile import _disable_dynamo as not_followed
    from torch._ops import HigherOrderOperator, OpOverload
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch._subclasses.functional_tensor import FunctionalTensor
    from torch.nn.modules import module as _module
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.dropout import _DropoutNd as DropoutNd
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._python_dispatch import _disable_current_modes as without_modes

    GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
        _module._global_forward_hooks,
        _module._global_forward_pre_hooks,
        _module._global_backward_hooks,
        _module._global_backward_pre_hooks,
    )
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"mfx runs on torch 2.11 to 2.15, and torch {torch.__version__} has moved a name that it needs: {error}. "
        "Install a torch of these versions, or a newer mfx"
    ) from error

__all__ = [
    "GLOBAL_HOOKS",
    "DataDependentOutputException",
    "DropoutNd",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "HigherOrderOperator",
    "NormBase",
    "OpOverload",
    "TorchDispatchMode",
    "backward_number",
    "children_of",
    "compiled_alike",
    "compiled_like",
    "convolution_kernel",
    "current_node",
    "dynamo",
    "each_size_apart",
    "evaluated",
    "forward_derivative_is_on",
    "functions_are_transformed",
    "graph_is_kept",
    "has_float64",
    "is_lifted_number",
    "is_profiled",
    "is_recording",
    "keeping_version",
    "not_followed",
    "only_explains",
    "pytree",
    "source_name",
    "source_of",
    "way_of_compiling",
    "when_backward_ends",
    "will_run",
    "without_modes",
    "without_recorders",
]

DYNAMO = {
    "InstructionTranslator": "torch._dynamo.symbolic_convert",
    "_TorchDynamoContext": "torch._dynamo.eval_frame",
    "TensorVariable": "torch._dynamo.variables",
    "UnspecializedNNModuleVariable": "torch._dynamo.variables.nn_module",
    "_get_closure_vars": "torch._dynamo.guards",
    "AttrSource": "torch._dynamo.source",
    "GuardBuilder": "torch._dynamo.guards",
    "_get_frame": "torch._dynamo.convert_frame",
    "comptime": "torch._dynamo.comptime",
    "config": "torch._dynamo",
    "dynamo_timed": "torch._dynamo.utils",
    "fullgraph_capture": "torch._dynamo.convert_frame",
    "get_metrics_context": "torch._dynamo.utils",
    "install_guard": "torch._dynamo.guards",
    "proxy_args_kwargs": "torch._dynamo.utils",
    "lookup_backend": "torch._dynamo.backends.registry",
    "mark_dynamic": "torch._dynamo",
    "PythonReferenceAnalysis": "torch.utils._sympy.reference",
    "_config": "torch.fx.experimental",
    "sympy_interp": "torch.utils._sympy.interp",
    "wrap_fx_proxy": "torch._dynamo.variables.builder",
}
"""What mfx uses of Dynamo and of what it stands on, and where it lies in torch 2.11 to 2.15."""


@functools.cache
def dynamo() -> Any:
    """The names of :data:`DYNAMO`, as attributes.

    Raises:
        ImportError: this torch has moved one.
    """
    found = {}
    for name, place in DYNAMO.items():
        module = importlib.import_module(place)
        if not hasattr(module, name):
            raise ImportError(
                f"mfx needs {place}.{name}, which torch 2.11 to 2.15 have and torch {torch.__version__} has not: "
                "capture='fx' and eager mode work without it"
            )
        found[name] = getattr(module, name)
    return SimpleNamespace(**found)


def children_of(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The branches of a tree: an attribute in torch 2.11, and a method later."""
    return spec.children() if hasattr(spec, "children") else spec.children_specs


def source_name(source: Any) -> str:
    """Dynamo's name of a graph input: ``Source.name`` is a method in torch 2.11 and a property in 2.15."""
    name: Any = source.name
    return str(name() if callable(name) else name)


def source_of(placeholder: Any) -> Any:
    """Where Dynamo has a graph input from; None where it does not say."""
    return getattr(placeholder, "_dynamo_source", None)


def is_lifted_number(placeholder: Any) -> bool:
    """Whether a tensor input of Dynamo's graph is a float that may change, with an ``item()`` in the graph."""
    return bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))


def way_of_compiling(compiled: Any) -> Any:
    """What ``torch.compile`` made a function with, by which another can be made (:func:`compiled_like`); or None."""
    names = dict(zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True))
    way = names["self"].cell_contents if "self" in names else None
    return way if isinstance(way, dynamo()._TorchDynamoContext) else None


def only_explains(backend: Any) -> bool:
    """Whether it is that of ``torch._dynamo.explain``, which compiles nothing."""
    return getattr(backend, "__name__", "") == "dynamo_graph_accumulating_compiler"


def compiled_alike(one: Any, other: Any) -> bool:
    """Whether two such ways are the same."""
    return _settings(one) == _settings(other)


def _settings(way: Any) -> tuple[Any, ...]:
    """What a way of compiling was made of; the backend lies within several wrappers, whose name torch has changed."""
    backend: Any = way.callback
    for _ in range(8):
        inner = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(
            backend, "_torchdynamo_orig_callable", None
        )
        backend = backend if inner is None else inner
    return backend, way.fullgraph, *(getattr(way, name, None) for name in ("_dynamic", "compiler_config"))


def compiled_like(way: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled in this way."""
    return way(function)


def is_recording() -> bool:
    """Whether operations become a graph as they run."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_profiled() -> bool:
    """Whether a profiler is at work."""
    return torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]


def functions_are_transformed() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap ...) is at work."""
    return torch._C._are_functorch_transforms_active()


@contextlib.contextmanager
def without_recorders() -> Iterator[None]:
    """Outside of the function modes by which ``torch.export`` and ``make_fx`` record; others (a device's) stay."""
    with contextlib.ExitStack() as stack:
        while type(torch.overrides._get_current_function_mode()).__module__.startswith(("torch._export", "torch.fx")):
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        yield


def each_size_apart() -> contextlib.AbstractContextManager[None]:
    """While it lasts, sizes that may vary are not taken for the same because they are equal in the example."""
    return dynamo()._config.patch(use_duck_shape=False)


def evaluated(expression: Any, symbols: dict[Any, Any]) -> bool:
    """What an expression of a shape environment is for these values of its symbols, which may be symbolic as well."""
    return bool(dynamo().sympy_interp(dynamo().PythonReferenceAnalysis, symbols, expression))


def forward_derivative_is_on() -> bool:
    """Whether forward-mode differentiation is at work."""
    return torch.autograd.forward_ad._current_level >= 0


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device can be float64: not on MPS, and on XPU it depends on the chip."""
    if device.type == "xpu":
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return device.type != "mps"


def keeping_version(tensors: tuple[torch.Tensor, ...]) -> contextlib.AbstractContextManager[None]:
    """While it lasts, what counts as a change in place of these tensors does not count."""
    if not tensors:
        return contextlib.nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(tensors)  # pyright: ignore[reportPrivateImportUsage]


def will_run(leaf: torch.Tensor) -> bool:
    """While a backward runs: whether it will come to this leaf of its graph.

    A backward that is asked for the gradients of some tensors comes to nothing else.
    Source: torch/csrc/autograd/init.cpp, THPModule_willEngineExecuteNode.
    """
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node)


def current_node() -> Any:
    """The autograd node whose backward runs now; None outside of one."""
    return torch._C._current_autograd_node()


def backward_number() -> int:
    """Which backward runs."""
    return torch._C._current_graph_task_id()


def graph_is_kept() -> bool:
    """Whether the backward that runs leaves its graph for another one (``retain_graph``)."""
    # Source: torch/csrc/autograd/init.cpp; torch's own compiled functions ask it before they reuse buffers.
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


def when_backward_ends(call: Callable[[], Any]) -> None:
    """While a backward runs: call this at its end, if it ends well."""
    torch.autograd.Variable._execution_engine.queue_callback(call)  # type: ignore[attr-defined]


def convolution_kernel(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> str:
    """The kernel that torch would take for a convolution of such tensors on the CPU: "Mkldnn", "Slow2d" ...

    Fake tensors do; "" for one that torch has no name for in Python (transposed ones of oneDNN).
    """
    with without_modes():
        # One element each, so that no size takes memory.
        twins = [torch.empty((), dtype=tensor.dtype).expand(tensor.shape) for tensor in (x, w)]
        how = (stride, padding, dilation, transposed, output_padding, groups)
        kernel = torch._C._select_conv_backend(twins[0], twins[1], None, *how)
    return getattr(kernel, "name", "").strip("?")
