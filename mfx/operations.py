"""What each operation does, as far as a rewriting needs to know.

One place answers, for a node of a captured graph: is it an add, does it do nothing, does it only read
metadata, may its result share memory with an input, which inputs does it write to, does it draw random
numbers, does it keep the shape of its input.  All answers are static; what cannot be known (an opaque
function) is answered in the safe direction, and :mod:`mfx.recompute` checks version counters at run time.

Operations are told apart by their plain name (``add`` for ``torch.add``, ``Tensor.add``, ``operator.add``
and ``aten.add.Tensor``), which is what the forms have in common in every kind of graph.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

_KNOWN_NAMESPACES = ("torch", "_operator", "operator", "math", "builtins", "einops", "mfx")

_QUERIES = frozenset(
    "size dim ndimension numel nelement stride storage_offset element_size is_contiguous is_floating_point "
    "is_complex get_device shape dtype device ndim layout is_cuda itemsize nbytes requires_grad is_leaf "
    "is_cpu is_meta is_mps is_xpu is_sparse is_quantized is_nested is_mkldnn finfo iinfo len".split()
)
_LIKE_FACTORIES = frozenset("zeros_like ones_like empty_like full_like rand_like randn_like randint_like".split())

_VIEWS = frozenset(
    "view reshape transpose permute flatten unflatten squeeze unsqueeze expand expand_as narrow select chunk "
    "split unbind tensor_split hsplit vsplit t T mT H mH movedim moveaxis swapaxes swapdims view_as diagonal "
    "contiguous to type_as float double half bfloat16 detach getitem real imag unfold as_strided getattr data "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout stochastic_depth "
    "Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Flatten Unflatten "
    "broadcast_to atleast_1d atleast_2d atleast_3d ravel view_as_real view_as_complex requires_grad_".split()
)

_RESHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as".split())
_PERMUTATIONS = frozenset("transpose permute swapaxes swapdims movedim moveaxis t".split())

_NORMS = ("batch_norm", "instance_norm")

_RANDOM = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout "
    "dropout_ alpha_dropout_ feature_dropout_ feature_alpha_dropout_ rand randn randint randperm normal rand_like "
    "randn_like randint_like bernoulli multinomial poisson binomial rrelu rrelu_ gumbel_softmax "
    "fractional_max_pool2d fractional_max_pool3d fractional_max_pool2d_with_indices "
    "fractional_max_pool3d_with_indices normal_ uniform_ bernoulli_ random_ exponential_ cauchy_ log_normal_ "
    "geometric_ multi_head_attention_forward stochastic_depth drop_block2d drop_block3d".split()
)
_RANDOM_MODULES = (
    _DropoutNd,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)

_DROPOUTS = frozenset(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout stochastic_depth".split()
)

_KEEPS_SHAPE = _DROPOUTS | frozenset(
    "relu relu_ relu6 gelu silu mish sigmoid tanh tanh_ sigmoid_ elu selu celu leaky_relu leaky_relu_ hardswish "
    "hardsigmoid hardtanh hardtanh_ softplus softsign logsigmoid softmax log_softmax prelu rrelu threshold "
    "layer_norm batch_norm group_norm instance_norm rms_norm normalize contiguous clone to float double half "
    "bfloat16 type_as detach clamp clamp_ clip exp abs neg".split()
)
_SCALED = frozenset("mul div truediv mul_ div_ add sub add_ sub_ imul itruediv iadd isub".split())
_KEEPS_SHAPE_MODULES = (
    nn.Identity,
    _DropoutNd,
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_INPLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv ipow imod iand ior ixor ilshift irshift imatmul".split()
)


@dataclass(frozen=True)
class Add:
    """``left + scale * right``, and which operand the result is written into, if any."""

    left: fx.Node
    right: fx.Node
    scale: float | fx.Node = 1.0
    written: fx.Node | None = None


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
        if isinstance(target, torch._ops.OpOverload):
            return target._schema.name.split("::")[-1]
        return getattr(target, "__name__", type(target).__name__)
    return ""


def add_form(node: fx.Node) -> Add | None:
    """The operands of a two-tensor add or subtraction; None for every other node."""
    if node.op not in ("call_function", "call_method") or not _known(node):
        return None
    name = name_of(node)
    plain = name.rstrip("_")
    if plain not in ("add", "iadd", "sub", "isub", "subtract") or node.kwargs.get("out") is not None:
        return None
    operands = [*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
    if len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    left, right = operands
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    alpha = node.kwargs.get("alpha", 1)
    sign = -1 if "sub" in plain else 1
    scale = alpha if isinstance(alpha, fx.Node) else sign * float(alpha)  # type: ignore[arg-type]
    in_place = name.endswith("_") or name in _INPLACE_OPERATORS
    return Add(left, right, scale, left if in_place else None)


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
    return name in _LIKE_FACTORIES or (node.op == "call_method" and name.startswith("new_"))


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
    return node.op == "call_function" and name_of(node) in ("_assert", "_assert_async", "_check")


def is_noop(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node's value is its first input's, in train and in eval mode."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return type(module) is nn.Identity or (isinstance(module, _DropoutNd) and module.p == 0)
    name = name_of(node)
    if name in ("contiguous", "clone"):
        return True
    if name in _DROPOUTS and node.op == "call_function":
        return argument(node, 1, "p", 0.5) == 0
    if name == "to" and node.op == "call_method" and "dtype_kept" in node.meta:
        return bool(node.meta["dtype_kept"])
    return False


def is_permutation(node: fx.Node) -> bool:
    """Whether the node only permutes the dimensions of its input."""
    return name_of(node) in _PERMUTATIONS and node.op in ("call_method", "call_function")


def rearranges(node: fx.Node) -> bool:
    """Whether the node's value has the elements of its first input, in another shape or order."""
    called = node.op in ("call_method", "call_function") and bool(node.args) and isinstance(node.args[0], fx.Node)
    return called and (is_permutation(node) or name_of(node) in _RESHAPES)


def aliased(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The input whose memory the node's value may be (a part of), if any."""
    if is_query(node) or not node.all_input_nodes:
        return None
    name = name_of(node, root)
    if name in _VIEWS:
        return node.all_input_nodes[0]
    # Normalization writes to its statistics and returns something else.
    return None if name in _NORMS else next(iter(writes(node, root)), None)


def writes(node: fx.Node, root: nn.Module) -> tuple[fx.Node, ...]:
    """The inputs that the node writes to in place, as far as can be seen."""
    if node.op == "call_module":
        in_place = getattr(root.get_submodule(str(node.target)), "inplace", False) is True
        return _first_nodes(node.args[:1]) if in_place else ()
    if node.op not in ("call_function", "call_method"):
        return ()
    name = name_of(node)
    if node.kwargs.get("out") is not None:
        return _first_nodes((node.kwargs["out"],))
    if name in ("setitem", "copyto", "copy_to") or name in _INPLACE_OPERATORS:
        return _first_nodes(node.args[:1])
    if name.endswith("_") and not name.endswith("__"):
        return _first_nodes(node.args[:1] or tuple(node.kwargs.values())[:1])
    if node.kwargs.get("inplace") is True or _positional_inplace(node):
        return _first_nodes(node.args[:1] or (node.kwargs.get("input"),))
    if moves_statistics(node):
        return _first_nodes((argument(node, 1, "running_mean"), argument(node, 2, "running_var")), every=True)
    return ()


def moves_statistics(node: fx.Node) -> bool:
    """Whether the node is a functional normalization by the batch's own statistics, which moves the running ones."""
    name = name_of(node)
    if name not in _NORMS or node.op != "call_function":
        return False
    position, keyword = (5, "training") if name == "batch_norm" else (5, "use_input_stats")
    return argument(node, position, keyword, name == "instance_norm") is not False


def is_ambient(node: fx.Node) -> bool:
    """Whether the node switches what all after it run under: autocast, the grad mode, torch.func and the like."""
    name = name_of(node) if node.op == "call_function" else ""
    switch = name.startswith(("_enter_", "_exit_", "_set_")) or name.endswith("crement_nesting")
    return (switch or name == "lazy_load_decompositions") and _known(node)


def is_random(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may draw random numbers (in some mode); opaque functions may."""
    if node.op == "call_module":
        return module_is_random(root.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if name == "scaled_dot_product_attention":
        return argument(node, 4, "dropout_p", 0.0) != 0.0
    if name in _RANDOM or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return node.op == "call_function" and not _known(node)


def draws_nothing(node: fx.Node) -> bool:
    """Whether a random operation is switched off by what its call says: evaluation mode, or a probability of 0."""
    if node.op != "call_function":
        return False
    name = name_of(node)
    if name == "multi_head_attention_forward":
        return node.kwargs.get("training") is False
    switch = argument(node, 2, "training", node.kwargs.get("train"))
    return name in _DROPOUTS and (argument(node, 1, "p", 0.5) == 0 or switch is False)


def takes_item(node: fx.Node) -> bool:
    """Whether the node is one of several values: ``values[i]``, ``values["name"]`` or ``values.name``."""
    if node.target is getattr:
        return not is_query(node)
    return node.target is operator.getitem and isinstance(node.args[1], (int, str))


def sees_grad_mode(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may compute otherwise where gradients are off."""
    if node.op != "call_module":
        return node.op == "call_function" and not _known(node)
    return module_sees_grad_mode(root.get_submodule(str(node.target)))


def module_is_random(module: nn.Module) -> bool:
    """Whether a module may draw random numbers (in some mode)."""
    return any(_is_random_module(inner) for inner in module.modules())


def module_sees_grad_mode(module: nn.Module) -> bool:
    """Whether a module may compute otherwise where gradients are off."""
    inner = module.modules()
    return any(isinstance(m, nn.MultiheadAttention) or not type(m).__module__.startswith("torch.nn") for m in inner)


def own_generator(node: fx.Node) -> bool:
    """Whether the node draws from a generator that it is given."""
    return isinstance(node.kwargs.get("generator"), (torch.Generator, fx.Node))


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
    return name in _KEEPS_SHAPE


def is_pure(node: fx.Node, root: nn.Module) -> bool:
    """Whether leaving the node out, where nobody uses it, changes nothing at all."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    return not (is_assertion(node) or is_ambient(node) or is_random(node, root) or writes(node, root)) and (
        node.op == "call_method" or _known(node)
    )


def argument(node: fx.Node, position: int, keyword: str, default: Any = None) -> Any:
    """An argument of a node's call, wherever it stands."""
    if keyword in node.kwargs:
        return node.kwargs[keyword]
    return node.args[position] if len(node.args) > position else default


def _known(node: fx.Node) -> bool:
    """Whether a called function is torch's or Python's own; another one is opaque."""
    if node.op != "call_function":
        return True
    target: Any = node.target
    module = getattr(target, "__module__", None) or ""
    if isinstance(target, torch._ops.OpOverload):
        return True
    known_module = module.split(".")[0] in _KNOWN_NAMESPACES
    return known_module or type(target).__name__ in ("builtin_function_or_method", "method_descriptor")


def _is_random_module(module: nn.Module) -> bool:
    if isinstance(module, _RANDOM_MODULES):
        return getattr(module, "p", 1) != 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return bool(module.dropout)
    return not type(module).__module__.startswith("torch.nn")


def _positional_inplace(node: fx.Node) -> bool:
    """F.relu(x, True), F.dropout(x, p, training, True): the flag is the last positional argument."""
    if node.op != "call_function" or not getattr(node.target, "__module__", "").startswith("torch.nn"):
        return False
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    return "inplace" in names and argument(node, names.index("inplace"), "inplace", False) is True


def _first_nodes(values: tuple[Any, ...], every: bool = False) -> tuple[fx.Node, ...]:
    nodes = tuple(value for value in values if isinstance(value, fx.Node))
    return nodes if every else nodes[:1]
