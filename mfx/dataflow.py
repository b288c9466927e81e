"""Dataflow: what depends on what in a captured graph, what shares memory, and whose order matters.

One pass over the nodes, in order:

1. ``inputs`` of a node are the nodes it computes from; metadata queries (shape, dtype, ``zeros_like`` ...) cut the data
   flow, so a value built from sizes alone depends on nothing.
2. ``origins`` is the set (as a bit mask) of graph inputs a value is computed from, or that were written into its
   memory before.
3. ``ancestors`` is the set of *skip candidates* a value is computed from.  A candidate is dropped from the
   sets after the last add that reads it, so on a chain of blocks the sets stay small and the pass linear.
4. ``memory`` names, for each node, the node whose memory it may share (views, in-place results).
5. ``resources`` lists what a node shares with others in a way that fixes their order: the random
   generator, a mode (autocast, gradients) that the graph switches, memory that somebody writes to, a module with
   state that is called more than once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from mfx import operations
from mfx.operations import Add

GENERATOR = "random generator"
AMBIENT = "ambient mode"
SHAPE = "mfx_shape"
"""node.meta key: the shape of the node's value, where shapes are known."""
DTYPE = "mfx_dtype"
"""node.meta key: the dtype of the node's value, where shapes are known."""
LIFTED = "mfx_lifted"
"""node.meta key of a placeholder that stands for a parameter or buffer: which of the two words."""


@dataclass(frozen=True, eq=False)
class Dataflow:
    """The facts of one graph; nodes are looked up by identity."""

    graph: fx.Graph
    root: nn.Module
    nodes: tuple[fx.Node, ...]
    position: dict[fx.Node, int] = field(repr=False)
    adds: dict[fx.Node, Add] = field(repr=False)
    origins: dict[fx.Node, int] = field(repr=False)
    ancestors: dict[fx.Node, frozenset[fx.Node]] = field(repr=False)
    memory: dict[fx.Node, fx.Node] = field(repr=False)
    written: dict[fx.Node, tuple[fx.Node, ...]] = field(repr=False)
    writers: dict[fx.Node, tuple[fx.Node, ...]] = field(repr=False)
    stale_reads: dict[fx.Node, fx.Node] = field(repr=False)
    resources: dict[fx.Node, frozenset[object]] = field(repr=False)

    def source(self, node: fx.Node) -> fx.Node:
        """The value behind nodes that do nothing."""
        return _source(node, self.root)

    def has_parameters(self, node: fx.Node) -> bool:
        """Whether the node is a parameter, or calls a module that has some."""
        if node.op == "placeholder":
            return node.meta.get(LIFTED) == "parameter"
        if node.op == "get_attr":
            return isinstance(get_attribute(self.root, str(node.target)), nn.Parameter)
        if node.op == "call_module":
            return next(self.root.get_submodule(str(node.target)).parameters(), None) is not None
        return False


def get_attribute(root: nn.Module, path: str) -> object:
    """The parameter, buffer or module at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def analyse(graph: fx.Graph, root: nn.Module, whole: Mapping[fx.Node, fx.Node] | None = None) -> Dataflow:
    """The facts of ``graph``; ``whole`` are the values of module calls that are blocks, with their x."""
    nodes = tuple(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    adds = {node: form for node in nodes if (form := operations.add_form(node)) is not None}
    last_read = _last_reads(nodes, position, adds, root, whole or {})
    memory = _memory(nodes, root)
    written = {node: found for node in nodes if (found := operations.writes(node, root))}
    origins, ancestors = _flow(nodes, position, last_read, memory, written)
    writers = _writers(memory, written)
    return Dataflow(
        graph=graph,
        root=root,
        nodes=nodes,
        position=position,
        adds=adds,
        origins=origins,
        ancestors=ancestors,
        memory=memory,
        written=written,
        writers=writers,
        stale_reads=_stale_reads(nodes, position, adds, memory),
        resources=_resources(nodes, root, memory, writers),
    )


def _source(node: fx.Node, root: nn.Module) -> fx.Node:
    while node.op != "placeholder" and node.all_input_nodes and operations.is_noop(node, root):
        node = node.all_input_nodes[0]
    return node


def before_rearranging(node: fx.Node) -> tuple[fx.Node, ...]:
    """The rearranging operations that ``node`` is the last of, in order."""
    found: list[fx.Node] = []
    while operations.rearranges(node):
        found.append(node)
        node = node.all_input_nodes[0]
    return tuple(reversed(found))


def rearranged(node: fx.Node) -> tuple[fx.Node, ...]:
    """The rearranging operations after ``node``, each the only reader of the one before."""
    found: list[fx.Node] = []
    while True:
        users = [user for user in node.users if not operations.is_query(user)]
        if len(users) != 1 or not operations.rearranges(users[0]) or users[0].all_input_nodes[0] is not node:
            return tuple(found)
        node = users[0]
        found.append(node)


def _last_reads(
    nodes: tuple[fx.Node, ...],
    position: dict[fx.Node, int],
    adds: dict[fx.Node, Add],
    root: nn.Module,
    whole: Mapping[fx.Node, fx.Node],
) -> dict[fx.Node, int]:
    """Each skip candidate, with the position of the last add (or whole block) that reads it."""
    last: dict[fx.Node, int] = {}
    for node in nodes:
        form = adds.get(node)
        if form is not None:
            end = position[(node, *rearranged(node))[-1]]
            for operand in (form.left, form.right):
                skip = _source(operand, root)
                last[skip] = max(position[node], last.get(skip, 0))
                for first in before_rearranging(skip)[:1]:
                    x = _source(first.all_input_nodes[0], root)
                    last[x] = max(end, last.get(x, 0))
        if node in whole:
            skip = _source(whole[node], root)
            last[skip] = max(position[node], last.get(skip, 0))
    return last


def _flow(
    nodes: tuple[fx.Node, ...],
    position: dict[fx.Node, int],
    last_read: dict[fx.Node, int],
    memory: dict[fx.Node, fx.Node],
    written: dict[fx.Node, tuple[fx.Node, ...]],
) -> tuple[dict[fx.Node, int], dict[fx.Node, frozenset[fx.Node]]]:
    origins: dict[fx.Node, int] = {}
    ancestors: dict[fx.Node, frozenset[fx.Node]] = {}
    contents: dict[fx.Node, int] = {}
    inputs = 0
    for node in nodes:
        mask, above = 0, frozenset[fx.Node]()
        if node.op == "placeholder" and LIFTED in node.meta:
            pass
        elif node.op == "placeholder":
            mask, inputs = 1 << inputs, inputs + 1
        elif not operations.is_query(node) and not operations.is_like_factory(node):
            for source in node.all_input_nodes:
                mask |= origins[source] | contents.get(memory[source], 0)
                above |= ancestors[source]
            for target in written.get(node, ()):
                contents[memory[target]] = contents.get(memory[target], 0) | mask
        here = position[node]
        above = frozenset(skip for skip in above if last_read[skip] >= here)
        origins[node] = mask
        ancestors[node] = above | {node} if node in last_read else above
    return origins, ancestors


def _memory(nodes: tuple[fx.Node, ...], root: nn.Module) -> dict[fx.Node, fx.Node]:
    memory: dict[fx.Node, fx.Node] = {}
    attributes: dict[object, fx.Node] = {}
    for node in nodes:
        shared = operations.aliased(node, root)
        if node.op == "get_attr":
            memory[node] = attributes.setdefault(node.target, node)
        else:
            memory[node] = node if shared is None else memory[shared]
    return memory


def _writers(
    memory: dict[fx.Node, fx.Node], written: dict[fx.Node, tuple[fx.Node, ...]]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The owner of each memory that somebody writes to, with its writers in order."""
    collected: dict[fx.Node, list[fx.Node]] = {}
    for node, targets in written.items():
        for owner in {memory[target] for target in targets}:
            collected.setdefault(owner, []).append(node)
    return {owner: tuple(found) for owner, found in collected.items()}


def _stale_reads(
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


def _resources(
    nodes: tuple[fx.Node, ...],
    root: nn.Module,
    memory: dict[fx.Node, fx.Node],
    writers: dict[fx.Node, tuple[fx.Node, ...]],
) -> dict[fx.Node, frozenset[object]]:
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    resources: dict[fx.Node, frozenset[object]] = {}
    switched = _switched(nodes)
    for node in nodes:
        if operations.is_query(node):
            continue
        held: set[object] = {memory[source] for source in node.all_input_nodes if memory[source] in writers}
        if operations.is_random(node, root):
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
