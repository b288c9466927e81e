"""Writes: which memory a node's value may be a part of, and which it writes to.

Answers are static and safe: a value that may be a view counts as one.  What an opaque function writes to cannot be
seen; :mod:`mfx.run.reversible` checks version counters at run time.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from mfx.graph.draws import is_dropout
from mfx.graph.operations import INPLACE_OPERATORS, argument, is_query, name_of
from mfx.torch_versions import DropoutNd, OpOverload

_VIEWS = frozenset(
    "view reshape transpose permute flatten unflatten squeeze unsqueeze expand expand_as narrow select chunk "
    "split unbind tensor_split hsplit vsplit t T mT H mH movedim moveaxis swapaxes swapdims view_as diagonal "
    "contiguous to type_as float double half bfloat16 detach getitem real imag unfold as_strided getattr data "
    "broadcast_to atleast_1d atleast_2d atleast_3d ravel view_as_real view_as_complex requires_grad_ "
    "values nested_tensor_from_jagged parted".split()
)

_MAY_PASS = (nn.Identity, DropoutNd, nn.Flatten, nn.Unflatten)

_NORMS = ("batch_norm", "instance_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")


def aliased(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The input whose memory the node's value may be (a part of), if any."""
    if is_query(node) or not node.all_input_nodes:
        return None
    name = name_of(node, root)
    passes = node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), _MAY_PASS)
    if passes or name in _VIEWS or is_dropout(name):
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
    if name in ("setitem", "copyto", "copy_to") or name in INPLACE_OPERATORS:
        return _first_nodes(node.args[:1])
    if name.endswith("_") and not name.endswith("__"):
        return _first_nodes(node.args[:1] or tuple(node.kwargs.values())[:1])
    if node.kwargs.get("inplace") is True or _positional_inplace(node):
        return _first_nodes(node.args[:1] or (node.kwargs.get("input"),))
    return running_statistics(node) if moves_statistics(node) else _by_schema(node)


def moves_statistics(node: fx.Node) -> bool:
    """Whether the node is a functional normalization by the batch's own statistics, which moves the running ones."""
    name = name_of(node)
    if name not in _NORMS or node.op != "call_function":
        return False
    keyword = "use_input_stats" if name == "instance_norm" else "training"
    return argument(node, 5, keyword, name == "instance_norm") is not False


def _by_schema(node: fx.Node) -> tuple[fx.Node, ...]:
    """What an operator of torch.ops says that it writes to."""
    operator = getattr(node.target, "default", node.target)
    if not isinstance(operator, OpOverload):
        return ()
    written = [place for place, given in enumerate(operator._schema.arguments) if given.is_write]
    return _first_nodes(tuple(argument(node, place, operator._schema.arguments[place].name) for place in written), True)


def running_statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """The running statistics that a functional normalization is given."""
    # Those of torch.nn.functional take them before weight and bias, those of torch itself after them.
    first = 1 if getattr(node.target, "__module__", "") == "torch.nn.functional" else 3
    return _first_nodes((argument(node, first, "running_mean"), argument(node, first + 1, "running_var")), every=True)


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
