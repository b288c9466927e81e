"""Resources: what nodes of a graph share in a way that fixes their order.

1. ``memory`` names, for each node, the node whose memory it may share (views, in-place results).
2. ``writers`` are the nodes that write to a memory; ``stale_reads`` the in-place adds after which an older name of the
   memory is still read.
3. A node holds as resources the random generator, the ambient modes that a compiler's graph switches and that are not
   noted on its nodes, memory that somebody writes to, and a module with state that is called more than once.
"""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from mfx.graph import operations
from mfx.graph.notes import MODES
from mfx.graph.sums import Add
from mfx.graph.writes import aliased

GENERATOR = "random generator"
AMBIENT = "ambient mode"


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
