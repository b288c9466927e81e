"""What each operation does, as far as a rewriting needs to know.

One place answers, for a node of a captured graph: does it do nothing, does it only read metadata, does it draw random
numbers, does it keep the shape of its input.  All answers are static; what cannot be known (an opaque function) is
answered in the safe direction.

Operations are told apart by their plain name (``add`` for ``torch.add``, ``Tensor.add``, ``operator.add``
and ``aten.add.Tensor``), which is what the forms have in common in every kind of graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from mfx.graph.draws import RANDOM, is_dropout, module_is_random, module_sees_grad_mode
from mfx.graph.notes import DTYPE_KEPT
from mfx.torch_versions import DropoutNd, HigherOrderOperator, NormBase, OpOverload

_KNOWN_NAMESPACES = ("torch", "_operator", "operator", "math", "builtins", "einops", "mfx")

_QUERIES = frozenset(
    "size dim ndimension numel nelement stride storage_offset element_size is_contiguous is_floating_point "
    "is_complex get_device shape dtype device ndim layout is_cuda itemsize nbytes requires_grad is_leaf "
    "is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested is_mkldnn finfo iinfo len".split()
)
_RESHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as".split())
_PERMUTATIONS = frozenset("transpose permute swapaxes swapdims movedim moveaxis t".split())

_KEEPS_SHAPE = frozenset(
    "relu relu_ relu6 gelu silu mish sigmoid tanh tanh_ sigmoid_ elu selu celu leaky_relu leaky_relu_ hardswish "
    "hardsigmoid hardtanh hardtanh_ softplus softsign logsigmoid softmax log_softmax prelu rrelu threshold "
    "layer_norm batch_norm group_norm instance_norm rms_norm normalize contiguous clone to float double half "
    "bfloat16 type_as detach clamp clamp_ clip exp abs neg".split()
)
_SCALED = frozenset("mul div truediv mul_ div_ add sub add_ sub_ imul itruediv iadd isub".split())
_KEEPS_SHAPE_MODULES = (
    nn.Identity,
    DropoutNd,
    NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
INPLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv ipow imod iand ior ixor ilshift irshift imatmul".split()
)


def name_of(node: fx.Node, root: nn.Module | None = None) -> str:
    """The plain name of what a node calls: ``add``, ``relu``, ``LayerNorm``, ``shape``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))).__name__ if root is not None else ""
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        target: Any = node.target
        if isinstance(target, OpOverload):
            return target._schema.name.split("::")[-1]
        return getattr(target, "__name__", type(target).__name__)
    return ""


def is_query(node: fx.Node) -> bool:
    """Whether the node reads only shape, dtype, device and the like of its input."""
    if node.op not in ("call_function", "call_method"):
        return False
    return name_of(node) in _QUERIES


def is_like_factory(node: fx.Node) -> bool:
    """Whether the node makes a new tensor and reads only the metadata of its input."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    return name.endswith("_like") or (node.op == "call_method" and name.startswith("new_"))


def is_shape_query(node: fx.Node) -> bool:
    """Whether the node asks for what all values along a chain have in common (not their dtype)."""
    return is_query(node) and name_of(node) not in (
        "dtype",
        "finfo",
        "iinfo",
        "requires_grad",
        "element_size",
    )


def is_assertion(node: fx.Node) -> bool:
    """Whether the node only checks something."""
    return node.op == "call_function" and name_of(node) in ("_assert", "_assert_async", "_check", "answered")


def is_noop(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node's value is its first input's, in train and in eval mode."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return type(module) is nn.Identity or (isinstance(module, DropoutNd) and module.p == 0)
    name = name_of(node)
    if name in ("contiguous", "clone"):
        return True
    if name in ("add", "radd") and node.op == "call_function":
        return len(node.all_input_nodes) == 1 and any(type(value) is int and value == 0 for value in node.args)
    if is_dropout(name) and node.op == "call_function":
        return argument(node, 1, "p", 0.5) == 0
    if name == "to" and node.op == "call_method" and DTYPE_KEPT in node.meta:
        return bool(node.meta[DTYPE_KEPT])
    return False


def is_permutation(node: fx.Node) -> bool:
    """Whether the node only permutes the dimensions of its input."""
    return name_of(node) in _PERMUTATIONS and node.op in ("call_method", "call_function")


def rearranges(node: fx.Node) -> bool:
    """Whether the node's value has the elements of its first input, in another shape or order."""
    called = node.op in ("call_method", "call_function") and bool(node.args) and isinstance(node.args[0], fx.Node)
    return called and (is_permutation(node) or name_of(node) in _RESHAPES)


def is_ambient(node: fx.Node) -> bool:
    """Whether the node switches what all after it run under: autocast, the grad mode, torch.func and the like."""
    name = name_of(node) if node.op == "call_function" else ""
    switch = name.startswith(("_enter_", "_exit_", "_set_")) or name.endswith("crement_nesting")
    return (switch or name == "lazy_load_decompositions") and is_known(node)


def is_random(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may draw random numbers (in some mode); opaque functions may."""
    if node.op == "call_module":
        return module_is_random(root.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if name == "scaled_dot_product_attention":
        return argument(node, 4, "dropout_p", 0.0) != 0.0
    if name in RANDOM or isinstance(node.target, HigherOrderOperator):
        return True
    return node.op == "call_function" and not is_known(node)


def draws_nothing(node: fx.Node) -> bool:
    """Whether a random operation is switched off by what its call says: evaluation mode, or a probability of 0."""
    if node.op != "call_function":
        return False
    name = name_of(node)
    if name == "multi_head_attention_forward":
        return node.kwargs.get("training") is False
    switch = argument(node, 2, "training", node.kwargs.get("train"))
    return is_dropout(name) and (argument(node, 1, "p", 0.5) == 0 or switch is False)


def own_generator(node: fx.Node) -> bool:
    """Whether the node draws from a generator that it is given."""
    return isinstance(node.kwargs.get("generator"), (torch.Generator, fx.Node))


def takes_item(node: fx.Node) -> bool:
    """Whether the node is one of several values: ``values[i]``, ``values["name"]`` or ``values.name``."""
    if node.target is getattr:
        return not is_query(node)
    return node.target is operator.getitem and isinstance(node.args[1], (int, str))


def sees_grad_mode(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may compute otherwise where gradients are off."""
    if node.op != "call_module":
        return node.op == "call_function" and not is_known(node)
    return module_sees_grad_mode(root.get_submodule(str(node.target)))


def keeps_shape(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node's value surely has its first input's shape."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        activation = type(module).__module__ == nn.modules.activation.__name__
        attention = isinstance(module, (nn.MultiheadAttention, nn.GLU))
        return isinstance(module, _KEEPS_SHAPE_MODULES) or (activation and not attention)
    name = name_of(node)
    if name in _SCALED:
        return len(node.all_input_nodes) == 1
    return name in _KEEPS_SHAPE or is_dropout(name)


def argument(node: fx.Node, position: int, keyword: str, default: Any = None) -> Any:
    """An argument of a node's call, wherever it stands."""
    if keyword in node.kwargs:
        return node.kwargs[keyword]
    return node.args[position] if len(node.args) > position else default


def is_known(node: fx.Node) -> bool:
    """Whether a called function is torch's or Python's own; another one is opaque."""
    if node.op != "call_function":
        return True
    target: Any = node.target
    module = getattr(target, "__module__", None) or ""
    if isinstance(target, OpOverload):
        return True
    known_module = module.split(".")[0] in _KNOWN_NAMESPACES
    return known_module or type(target).__name__ in ("builtin_function_or_method", "method_descriptor")
