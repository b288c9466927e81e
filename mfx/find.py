"""Find: the residual blocks of a captured graph.  Pure; reads the graph, changes nothing.

For each add ``y = s + b`` of two tensors computed from a common input:

1. the *skip* is the operand that the other one is computed from, looking through nodes that do nothing;
   where there is none the skip path transforms x and the add is kept;
2. the *branch* is all nodes on paths from skip to the other operand, with what they alone use: side values
   computed on the way, metadata queries, assertions, in-place writes to the branch's own values;
3. operations ``h`` after the add belong to the block (``y = h(x + f(x))``, a *wrapped* block) when they keep
   the shape, use nothing else that depends on x, have no other consumer, and (a) the next block's skip
   starts after them, (b) they end in what the add's own module returns, or (c) they repeat the ``h`` of the
   block before;
4. a module named by the caller is a wrapped block by itself.

Everything that is a residual add and not a block is a :class:`Rejection` with its node and reason.

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.
Known limits: blocks whose skip and branch meet otherwise than in an add (concatenation, gates).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx, nn

from mfx import operations
from mfx.dataflow import SHAPE, Dataflow, analyse
from mfx.errors import Reason
from mfx.operations import Add
from mfx.tracer import RETURNED, SCOPE, Scope


@dataclass(frozen=True, eq=False)
class Block:
    """``x -> y``: residual, ``y = x + scale * f(x)``, or wrapped, ``y = G(x)`` with ``F(x) = G(x) - x``.

    ``value`` is the node of f(x) or G(x); ``members`` are the nodes that compute it, in order; ``sides``
    are read from outside, ``escapes`` are members (never ``value`` of a wrapped block) read outside.
    """

    kind: str
    skip: fx.Node
    value: fx.Node
    output: fx.Node
    members: tuple[fx.Node, ...] = field(repr=False)
    sides: tuple[fx.Node, ...] = field(repr=False)
    escapes: tuple[fx.Node, ...] = field(repr=False)
    scale: float = 1.0
    written: str = ""
    tail: tuple[fx.Node, ...] = ()
    name: str = ""

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes that the block stands for; a query of x that others ask as well is not among them."""
        inside = {*self.members, self.output}
        own = [node for node in self.members if not _asked_outside(node, self.skip, inside)]
        return tuple(own) if self.kind == "wrapped" else (*own, self.output)


@dataclass(frozen=True, eq=False)
class Rejection:
    """A residual add that is kept, the reason, and the node that the reason is about."""

    add: fx.Node
    reason: Reason
    node: object = None
    name: str = ""

    @property
    def text(self) -> str:
        """The reason in words."""
        return self.reason.text(self.node)


@dataclass(frozen=True, eq=False)
class Found:
    """What :func:`find` found, in order of execution."""

    flow: Dataflow
    blocks: tuple[Block, ...]
    rejections: tuple[Rejection, ...]


def find(graph: fx.Graph, root: nn.Module, leaves: frozenset[fx.Node] = frozenset()) -> Found:
    """The blocks of ``graph``; ``leaves`` are module calls to take whole."""
    flow = analyse(graph, root, leaves)
    matches: list[Block | Rejection] = []
    for node in flow.nodes:
        if node in leaves:
            matches.append(_whole(flow, node))
        elif node in flow.adds:
            match = _match(flow, node, flow.adds[node])
            matches += [match] if match is not None else []
    matches = _wrap(flow, matches)
    names = _names(matches)
    named = [replace(match, name=name) for match, name in zip(matches, names, strict=True)]
    return Found(
        flow,
        tuple(match for match in named if isinstance(match, Block)),
        tuple(match for match in named if isinstance(match, Rejection)),
    )


def _match(flow: Dataflow, add: fx.Node, form: Add) -> Block | Rejection | None:
    """The block that ends in ``add``, why there is none, or None where the add is not residual."""
    left, right = form.left, form.right
    if not flow.origins[left] & flow.origins[right]:
        return None
    if flow.source(left) in flow.ancestors[right]:
        skip, value, scale = flow.source(left), right, form.scale
    elif flow.source(right) in flow.ancestors[left]:
        if form.scale != 1.0:
            return Rejection(add, Reason.SCALED_SKIP, add)
        skip, value, scale = flow.source(right), left, 1.0
    else:
        return Rejection(add, Reason.PROJECTION, _shorter_path(flow, left, right))
    if isinstance(scale, fx.Node):
        return Rejection(add, Reason.SCALED_SKIP, add)
    written = "" if form.written is None else "branch" if form.written is value else "skip"
    block = _block(flow, "residual", skip, value, add, scale=scale, written=written)
    return _check(flow, block)


def _whole(flow: Dataflow, node: fx.Node) -> Block | Rejection:
    if not node.all_input_nodes:
        return Rejection(node, Reason.PROJECTION, node)
    return _check(flow, _block(flow, "wrapped", flow.source(node.all_input_nodes[0]), node, node))


def _shorter_path(flow: Dataflow, left: fx.Node, right: fx.Node) -> fx.Node:
    """Which operand is the transformed skip: the one fewer computed values lie behind."""

    def depth(node: fx.Node) -> int:
        steps = 0
        while node.all_input_nodes and steps < 64:
            data = [source for source in node.all_input_nodes if flow.origins[source]]
            if not data or len(set(data)) > 1:
                return steps
            node, steps = data[0], steps + 1
            if len(node.users) > 1:
                return steps
        return steps

    return left if depth(left) < depth(right) else right


def _block(
    flow: Dataflow,
    kind: str,
    skip: fx.Node,
    value: fx.Node,
    output: fx.Node,
    tail: tuple[fx.Node, ...] = (),
    scale: float = 1.0,
    written: str = "",
) -> Block:
    """Collect the members, sides and escapes of the block from ``skip`` to ``value``."""
    members = _paths(flow, skip, value, tail)
    _absorb(flow, skip, members, flow.position[output])
    ordered = tuple(sorted(members, key=flow.position.__getitem__))
    sides = {
        source: None
        for node in ordered
        for source in node.all_input_nodes
        if source not in members and source is not skip
    }
    inside = members if kind == "wrapped" else members | {output}
    handed = [node for node in ordered if any(user not in inside for user in node.users)]
    ends = {value} if kind == "wrapped" else set[fx.Node]()
    escapes = tuple(node for node in handed if node not in ends and not _asked_outside(node, skip, inside))
    return Block(kind, skip, value, output, ordered, tuple(sides), escapes, scale, written, tail)


def _asked_outside(node: fx.Node, skip: fx.Node, inside: set[fx.Node]) -> bool:
    of_x = operations.is_query(node) and node.all_input_nodes[0] is skip
    return of_x and any(user not in inside for user in node.users)


def _paths(flow: Dataflow, skip: fx.Node, value: fx.Node, tail: tuple[fx.Node, ...]) -> set[fx.Node]:
    """All nodes on paths from ``skip`` to ``value``, then ``tail``."""
    members: set[fx.Node] = set(tail)
    pending = [value] if not tail else list(tail[0].all_input_nodes)
    while pending:
        node = pending.pop()
        if node in members or node is skip or skip not in flow.ancestors[node]:
            continue
        members.add(node)
        pending += [] if operations.is_query(node) else node.all_input_nodes
    return members


def _absorb(flow: Dataflow, skip: fx.Node, members: set[fx.Node], end: int) -> None:
    """Take in what belongs to the members alone: values only they use, queries, checks, own writes.

    A value computed before the branch starts is taken in where the block's own module computes it.
    """
    inner = flow.nodes[flow.position[skip] + 1 : end]
    first = min((flow.position[node] for node in members), default=end)
    home = flow.nodes[end].meta[SCOPE].path
    changed = True
    while changed:
        before = len(members)
        for node in reversed(inner):
            near = flow.position[node] > first or node.op == "get_attr" or _within(node, home)
            if node not in members and near and _serves(flow, node, skip, members):
                members.add(node)
        for node in inner:
            if node not in members and _follows(flow, node, skip, members):
                members.add(node)
        changed = len(members) > before


def _within(node: fx.Node, home: str) -> bool:
    path = node.meta[SCOPE].path
    return bool(home) and (path == home or path.startswith(f"{home}."))


def _serves(flow: Dataflow, node: fx.Node, skip: fx.Node, members: set[fx.Node]) -> bool:
    """Whether only members use the node's value (a query of x is taken in by each who needs it)."""
    if not node.users or node.op == "placeholder":
        return False
    if all(user in members for user in node.users):
        return True
    scalar = operations.is_query(node) and node.all_input_nodes[0] is skip
    return scalar and any(user in members for user in node.users)


def _follows(flow: Dataflow, node: fx.Node, skip: fx.Node, members: set[fx.Node]) -> bool:
    """Whether the node only asks, checks or writes what the members hold."""
    sources = node.all_input_nodes
    if not any(source in members for source in sources):
        return False
    if operations.is_query(node):
        return True
    if node.users:
        return False
    if operations.is_assertion(node):
        return all(source in members or source is skip for source in sources)
    return any(flow.memory[target] in members for target in flow.written.get(node, ()))


def _check(flow: Dataflow, block: Block) -> Block | Rejection:
    """The block, or the reason why it cannot be rewritten."""
    for reason, node in (
        (Reason.NO_PARAMETERS, _without_parameters(flow, block)),
        (Reason.BROADCAST, _broadcast(block)),
        (Reason.OWN_GENERATOR, next(filter(operations.own_generator, block.members), None)),
        *_write_faults(flow, block),
    ):
        if node is not None:
            return Rejection(block.output, reason, node)
    return block


def _without_parameters(flow: Dataflow, block: Block) -> fx.Node | None:
    sides = [node for node in block.sides if not flow.origins[node]]
    if any(flow.has_parameters(node) for node in block.members):
        return None
    return None if any(_from_parameter(flow, side) for side in sides) else block.value


def _from_parameter(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a value that depends on no input is computed from a parameter."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        here = pending.pop()
        if here not in seen:
            if flow.has_parameters(here):
                return True
            seen.add(here)
            pending += here.all_input_nodes
    return False


def _broadcast(block: Block) -> fx.Node | None:
    x, value = block.skip.meta.get(SHAPE), block.value.meta.get(SHAPE)
    return block.value if x is not None and value is not None and x != value else None


def _write_faults(flow: Dataflow, block: Block) -> list[tuple[Reason, fx.Node | None]]:
    """What the block's in-place writes, and writes during it, would break."""
    x = flow.memory[block.skip]
    members = set(block.members)
    add = block.output if block.output in flow.adds else None
    faults: list[tuple[Reason, fx.Node | None]] = []
    for node in block.members:
        if node is add:
            continue
        for owner in {flow.memory[target] for target in flow.written.get(node, ())}:
            if owner is x:
                faults.append((Reason.WRITES_SKIP, node))
            elif owner not in members and not _is_buffer(flow, owner):
                faults.append((Reason.WRITES_OUTSIDE, node))
            elif any(flow.memory[escape] is owner for escape in block.escapes):
                faults.append((Reason.READS_OVERWRITTEN, node))
    if block.written:
        owner = flow.memory[block.output]
        if owner.op in ("placeholder", "get_attr"):
            faults.append((Reason.WRITES_INPUT, block.output))
        faults.append((Reason.READS_OVERWRITTEN, flow.stale_reads.get(_add_of(block))))
    return faults


def _add_of(block: Block) -> fx.Node:
    return block.tail[0] if block.tail else block.output


def _is_buffer(flow: Dataflow, node: fx.Node) -> bool:
    return node.op == "get_attr" and not flow.has_parameters(node)


def _wrap(flow: Dataflow, matches: list[Block | Rejection]) -> list[Block | Rejection]:
    """Let each residual block take in the operations after its add that belong to it."""
    skips = {match.skip for match in matches if isinstance(match, Block)}
    ends: dict[fx.Node, Block] = {}
    wrapped: list[Block | Rejection] = []
    for match in matches:
        if isinstance(match, Block) and match.kind == "residual":
            tail = _tail(flow, match, skips, ends.get(match.skip))
            if tail:
                nodes = (match.output, *tail)
                grown = _block(flow, "wrapped", match.skip, tail[-1], tail[-1], nodes, 1.0, match.written)
                checked = _check(flow, grown)
                match = checked if isinstance(checked, Block) else match
        if isinstance(match, Block):
            ends[match.output] = match
        wrapped.append(match)
    return wrapped


def _tail(flow: Dataflow, block: Block, skips: set[fx.Node], before: Block | None) -> tuple[fx.Node, ...]:
    """The operations ``h`` after the add that belong to the block; empty where there are none."""
    path = _single_path(flow, block)
    scope: Scope = block.output.meta[SCOPE]
    if block.output in skips:
        return ()
    for length, node in enumerate(path, 1):
        if node in skips:
            return tuple(path[:length])
    if before is not None and before.tail:
        repeated = [_operation(flow, node) for node in before.tail[1:]]
        if [_operation(flow, node) for node in path[: len(repeated)]] == repeated:
            return tuple(path[: len(repeated)])
    if scope.path:
        for length in range(len(path), 0, -1):
            if scope in path[length - 1].meta.get(RETURNED, ()):
                return tuple(path[:length])
    return ()


def _single_path(flow: Dataflow, block: Block) -> list[fx.Node]:
    """The shape-keeping operations that follow the add one by one, each the only consumer."""
    path: list[fx.Node] = []
    node, start = block.output, flow.position[block.skip]
    while True:
        users = [user for user in node.users if not operations.is_query(user)]
        if len(users) != 1 or len(users) != len(node.users):
            return path
        (user,) = users
        others = [source for source in user.all_input_nodes if source is not node]
        foreign = any(flow.origins[source] and flow.position[source] > start for source in others)
        if user.op == "output" or foreign or not _keeps(flow, user, node):
            return path
        path.append(user)
        node = user


def _keeps(flow: Dataflow, node: fx.Node, source: fx.Node) -> bool:
    if not node.args or node.args[0] is not source:
        return False
    if SHAPE in node.meta and SHAPE in source.meta:
        return node.meta[SHAPE] == source.meta[SHAPE]
    return operations.keeps_shape(node, flow.root)


def _operation(flow: Dataflow, node: fx.Node) -> object:
    constants = tuple(arg for arg in node.args if not isinstance(arg, fx.Node))
    return operations.name_of(node, flow.root), repr(constants), repr(sorted(node.kwargs))


def _names(matches: list[Block | Rejection]) -> list[str]:
    """Module path of each residual add, with ``#k`` where one module runs several or at the root."""
    paths = [_path(match) for match in matches]
    total = Counter(paths)
    seen: Counter[str] = Counter()
    names = []
    for path in paths:
        names.append(f"{path}#{seen[path]}" if total[path] > 1 or not path else path)
        seen[path] += 1
    return names


def _path(match: Block | Rejection) -> str:
    node = (match.tail[0] if match.tail else match.output) if isinstance(match, Block) else match.add
    if node.op == "call_module":
        return str(node.target)
    return node.meta[SCOPE].path
