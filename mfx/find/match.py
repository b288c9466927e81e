"""Match: one sum to the residual block that ends in it, or to the reason why there is none.

1. An add of two tensors, one of which the other is computed from, is a residual block, ``y = x + scale * f(x)``.
2. Any other sum (:mod:`mfx.graph.sums`) of terms of which one is a multiple of x, and another is computed from x, is a
   wrapped block, ``F(x) = y - x``: a skip that is scaled or cast, a blend, branches that are added one by one.  Its
   branch has to have parameters that do more than to scale.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mfx.errors import Reason
from mfx.find.block import Block, Rejection, collect
from mfx.find.check import check
from mfx.find.far import Far
from mfx.find.fork import any_computes, parts_compute
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import SCOPE
from mfx.graph.sums import Add, Term

Found = Block | Far | Rejection


def match_sum(flow: Dataflow, total: fx.Node) -> Found | None:
    """The block that ends in a sum (one with a far skip is not collected), why there is none, or None if it is not
    residual."""
    form = flow.adds.get(total)
    found = None if form is None else with_skip(flow, total, form)
    return found if isinstance(found, Far) else mixed(flow, total) or found


def without_parts(flow: Dataflow, matches: Sequence[Found]) -> list[Found]:
    """``matches`` without those that are a part of a block's sum in the same forward: of branches, or with its skip."""
    skips = {
        node: match.skip
        for match in matches
        if not isinstance(match, Rejection) and match.add in flow.sums
        for term in flow.sums[match.add]
        for node in term.within
        if node.meta[SCOPE] == match.add.meta[SCOPE]
    }
    return [m for m in matches if m.add not in skips or not (isinstance(m, Rejection) or m.skip is skips[m.add])]


def is_mixed(block: Block) -> bool:
    """Whether :func:`mixed` found the block, and nothing after its sum belongs to it yet."""
    return block.tail == (block.output,)


def mixed(flow: Dataflow, total: fx.Node) -> Block | None:
    """The wrapped block that ends in the sum ``total``, if there is one."""
    terms = flow.sums.get(total, ())
    starts = [x for term in terms if (x := _multiple_of(flow, term, terms)) is not None]
    for skip in sorted(starts, key=flow.position.__getitem__):
        block = check(flow, collect(flow, "wrapped", skip, total, total, (total,)))
        if isinstance(block, Block) and any_computes(flow, block.members):
            return block
    return None


def _multiple_of(flow: Dataflow, term: Term, terms: Sequence[Term]) -> fx.Node | None:
    """What the term is a multiple of that another one is computed from."""
    if not term.kept or any(flow.origins[factor] for factor in term.by):
        return None
    others = [other for other in terms if other is not term]
    lost = {x for other in others if not other.kept for x in other.path}
    after = [flow.ancestors[other.path[0]] for other in others]
    return next((x for x in term.path if flow.origins[x] and x not in lost and any(x in up for up in after)), None)


def with_skip(flow: Dataflow, add: fx.Node, form: Add) -> Far | Rejection | None:
    """The add with its skip, without the nodes between; why it has none, or None where the add is not residual."""
    left, right = form.left, form.right
    shared = flow.origins[left] & flow.origins[right]
    if flow.source(left) in flow.ancestors[right]:
        skip, value, scale = flow.source(left), right, form.scale
    elif flow.source(right) in flow.ancestors[left]:
        if form.scale != 1.0:
            return Rejection(add, Reason.SUBTRACTED_SKIP, add) if shared else None
        skip, value, scale = flow.source(right), left, 1.0
    else:
        node = _shorter_path(flow, left, right)
        return Rejection(add, Reason.PROJECTION, node, residual=parts_compute(flow, left, right)) if shared else None
    if isinstance(scale, fx.Node):
        return None
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
