"""Resources: what nodes of a graph share in a way that fixes their order, and which memory they write to.

1. ``memory`` names, for each node, the node whose memory it may share (views, in-place results).
2. ``writers`` are the nodes that write to a memory; ``stale_reads`` the in-place adds after which an older name of the
   memory is still read.
3. A node holds as resources the random generator, the ambient modes that a compiler's graph switches and that are not
   noted on its nodes, memory that somebody writes to, and a module with state that is called more than once.

Answers are static and safe: a value that may be a view counts as one.  What an opaque function writes to cannot be
seen; :mod:`mfx.run.reversible` checks version counters at run time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

from mfx.graph import operations
from mfx.graph.draws import is_dropout
from mfx.graph.notes import MODES
from mfx.graph.operations import INPLACE_OPERATORS, argument, is_query, name_of
from mfx.graph.sums import Add
from mfx.torch_versions import DropoutNd, OpOverload

GENERATOR = "random generator"
AMBIENT = "ambient mode"

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


def memory_of(nodes: tuple[fx.Node, ...], root: nn.Module) -> dict[fx.Node, fx.Node]:
    """For each node, the node whose memory it may share."""
    memory: dict[fx.Node, fx.Node] = {}
    attributes: dict[object, fx.Node] = {}
    for node in nodes:
        shared = aliased(node, root)
        if node.op == "get_attr":
            memory[node] = attributes.setdefault(node.target, node)
        else:
            memory[node] = node if shared is None else memory[shared]
    return memory


def writers_of(
    memory: dict[fx.Node, fx.Node], written: dict[fx.Node, tuple[fx.Node, ...]]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The owner of each memory that somebody writes to, with its writers in order."""
    collected: dict[fx.Node, list[fx.Node]] = {}
    for node, targets in written.items():
        for owner in {memory[target] for target in targets}:
            collected.setdefault(owner, []).append(node)
    return {owner: tuple(found) for owner, found in collected.items()}


def stale_reads_of(
    nodes: tuple[fx.Node, ...],
    position: dict[fx.Node, int],
    adds: dict[fx.Node, Add],
    memory: dict[fx.Node, fx.Node],
) -> dict[fx.Node, fx.Node]:
    """For in-place adds after which an older name of the memory is still read: the node that reads it."""
    latest: dict[fx.Node, fx.Node] = {}
    stale: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        owner = memory[node]
        form = adds.get(node)
        if form is not None and form.written is not None:
            reader = latest.get(owner)
            if reader is not None and position[reader] > position[node]:
                stale[node] = reader
        for user in node.users:
            if not operations.is_query(user):
                latest[owner] = max(latest.get(owner, user), user, key=position.__getitem__)
    return stale


def resources_of(
    nodes: tuple[fx.Node, ...],
    root: nn.Module,
    memory: dict[fx.Node, fx.Node],
    writers: dict[fx.Node, tuple[fx.Node, ...]],
) -> dict[fx.Node, frozenset[object]]:
    """What each node holds; most hold nothing."""
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    resources: dict[fx.Node, frozenset[object]] = {}
    switched = set[fx.Node]() if MODES in nodes[-1].meta else _switched(nodes)
    for node in nodes:
        if operations.is_query(node):
            continue
        held: set[object] = {memory[source] for source in node.all_input_nodes if memory[source] in writers}
        if operations.is_random(node, root) and not operations.is_noop(node, root):
            held.add(GENERATOR)
        if node in switched:
            held.add(AMBIENT)
        if node.op == "call_module" and calls[node.target] > 1:
            module = root.get_submodule(str(node.target))
            if next(module.buffers(), None) is not None:
                held.add(node.target)
        if held:
            resources[node] = frozenset(held)
    return resources


def _switched(nodes: tuple[fx.Node, ...]) -> set[fx.Node]:
    """The nodes that run under another autocast state, grad mode or the like than the graph's end, and the switches."""
    switches = [node for node in nodes if operations.is_ambient(node)]
    settled = {operations.name_of(node): node.args for node in switches}
    now = dict[str, object]()
    depth, inside = 0, set(switches)
    for node in nodes:
        if node in inside:
            name = operations.name_of(node)
            depth += name.startswith("_enter_") or name.endswith("_increment_nesting")
            depth -= name.startswith("_exit_") or name.endswith("_decrement_nesting")
            if name.startswith("_set_"):
                now[name] = node.args
        elif depth or any(settled[name] != value for name, value in now.items()):
            inside.add(node)
    return inside
