"""Match: one add of two tensors to the residual block that ends in it, or to the reason why there is none."""

from __future__ import annotations

from torch import fx

from mfx.errors import Reason
from mfx.find.block import Block, Rejection
from mfx.find.far import Far
from mfx.graph.adds import Add
from mfx.graph.dataflow import Dataflow


def match_add(flow: Dataflow, add: fx.Node, form: Add) -> Block | Rejection | None:
    """The block that ends in ``add``, why there is none, or None where the add is not residual."""
    found = with_skip(flow, add, form)
    return found.collected(flow) if isinstance(found, Far) else found


def with_skip(flow: Dataflow, add: fx.Node, form: Add) -> Far | Rejection | None:
    """The add with its skip, without the nodes between; why it has none, or None where the add is not residual."""
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
        return Rejection(add, Reason.SCALED_BRANCH, scale)
    written = "" if form.written is None else "branch" if form.written is value else "skip"
    passed = _passed(form.left if value is form.right else form.right, skip, add)
    return Far(add, skip, value, scale, written, passed, branch_first=value is form.left, shared=bool(shared))


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
