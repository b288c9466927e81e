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
4. a module named by the caller is a wrapped block by itself, and so is a block between two rearrangements of x
   (:mod:`mfx.detour`).

Everything that is a residual add and not a block is a :class:`Rejection` with its node and reason.

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.
Known limits: blocks whose skip and branch meet otherwise than in an add (concatenation, gates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx, nn

from mfx import operations
from mfx.block import Block, Rejection, check, collect
from mfx.dataflow import SHAPE, Dataflow, analyse
from mfx.detour import take_in
from mfx.errors import Reason
from mfx.operations import Add
from mfx.tracer import RETURNED, SCOPE, Scope
from mfx.whole import Call, calls_of


@dataclass(frozen=True, eq=False)
class Found:
    """What :func:`find` found, in order of execution."""

    flow: Dataflow
    blocks: tuple[Block, ...]
    rejections: tuple[Rejection, ...]


def find(graph: fx.Graph, root: nn.Module, *, kind: str = "wrapped", only_whole: bool = False) -> Found:
    """The blocks of ``graph``.

    Args:
        graph: a captured graph; the module calls marked in it (:mod:`mfx.whole`) are blocks.
        root: the module that it is relative to.
        kind: what these calls are: ``"wrapped"`` blocks, or ``"branch"``, the branch of a residual add that the graph
            has or that is to be put in.
        only_whole: leave everything else as it is.
    """
    calls = calls_of(graph)
    flow = analyse(graph, root, {call.value: call.x for call in calls})
    whole = _whole_blocks(flow, calls, kind)
    covered = {node for match in whole.values() if isinstance(match, Block) for node in match.members}
    matches: list[Block | Rejection] = []
    for node in flow.nodes:
        if node in whole:
            matches.append(whole[node])
        elif node in flow.adds and not only_whole and node not in covered:
            match = _match(flow, node, flow.adds[node])
            matches += [match] if match is not None else []
    matches = _wrap(flow, take_in(flow, matches))
    names = _names(matches, {end: call.path for end, call in zip(whole, calls, strict=True)})
    named = [replace(match, name=name) for match, name in zip(matches, names, strict=True)]
    return Found(
        flow,
        tuple(match for match in named if isinstance(match, Block)),
        tuple(match for match in named if isinstance(match, Rejection)),
    )


def _whole_blocks(flow: Dataflow, calls: tuple[Call, ...], kind: str) -> dict[fx.Node, Block | Rejection]:
    """The block of each marked call, by the node that it ends in."""
    found: dict[fx.Node, Block | Rejection] = {}
    for call in calls:
        add = own_add(flow, call.x, call.value) if kind == "branch" else None
        match = None if add is None else _match(flow, add, flow.adds[add])
        if match is None:
            match = _whole(flow, call, kind)
        found[match.output if isinstance(match, Block) else match.add] = match
    return found


def own_add(flow: Dataflow, x: fx.Node, value: fx.Node) -> fx.Node | None:
    """The graph's own add of ``x`` and ``value``, if there is one."""
    for user in value.users:
        form = flow.adds.get(user)
        if form is not None and {flow.source(form.left), flow.source(form.right)} == {flow.source(x), value}:
            return user
    return None


def _whole(flow: Dataflow, call: Call, kind: str) -> Block | Rejection:
    skip = flow.source(call.x)
    if call.value is skip or skip not in flow.ancestors[call.value]:
        return Rejection(call.value, Reason.PROJECTION, call.value)
    return check(flow, collect(flow, kind, skip, call.value, call.value, home=call.path), named=True)


def _match(flow: Dataflow, add: fx.Node, form: Add) -> Block | Rejection | None:
    """The block that ends in ``add``, why there is none, or None where the add is not residual."""
    left, right = form.left, form.right
    shared = flow.origins[left] & flow.origins[right]
    if flow.source(left) in flow.ancestors[right]:
        skip, value, scale = flow.source(left), right, form.scale
    elif flow.source(right) in flow.ancestors[left]:
        if form.scale != 1.0:
            return Rejection(add, Reason.SCALED_SKIP, add) if shared else None
        skip, value, scale = flow.source(right), left, 1.0
    else:
        return Rejection(add, Reason.PROJECTION, _shorter_path(flow, left, right)) if shared else None
    if isinstance(scale, fx.Node):
        return Rejection(add, Reason.SCALED_SKIP, add)
    written = "" if form.written is None else "branch" if form.written is value else "skip"
    block = collect(flow, "residual", skip, value, add, scale=scale, written=written)
    passed = _passed(form.left if value is form.right else form.right, skip, add)
    checked = check(flow, replace(block, passed=passed, branch_first=value is form.left))
    if not shared and isinstance(checked, Rejection) and checked.reason is Reason.NO_PARAMETERS:
        return None
    return checked


def _passed(operand: fx.Node, skip: fx.Node, add: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes from the skip to the add, which do nothing, as far as the add alone reads them."""
    passed, reader = [], add
    while operand is not skip and list(operand.users) == [reader]:
        passed.append(operand)
        reader, operand = operand, operand.all_input_nodes[0]
    return tuple(reversed(passed))


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
                grown = collect(flow, "wrapped", match.skip, tail[-1], tail[-1], nodes, 1.0, match.written)
                checked = check(flow, grown)
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


def _names(matches: list[Block | Rejection], whole: Mapping[fx.Node, str]) -> list[str]:
    """Module path of each residual add, with ``#k`` where one module runs several or at the root."""
    paths = [_path(match, whole) for match in matches]
    total = Counter(paths)
    seen: Counter[str] = Counter()
    names = []
    for path in paths:
        names.append(f"{path}#{seen[path]}" if total[path] > 1 or not path else path)
        seen[path] += 1
    return names


def _path(match: Block | Rejection, whole: Mapping[fx.Node, str]) -> str:
    return whole[match.add] if match.add in whole else match.add.meta[SCOPE].path
