"""Joining: the whole gradient of a value from inside a branch, for whoever asks for it (M13).

Everything that leaves a segment leaves through its closing node, where every backward starts.  So the gradient of such
a value ``e``, seen from outside, would be that of its own readers: what comes to it through its own block, and through
later blocks that read it, is found only afterwards.  Therefore

1. after the closing node stands a :class:`Join` for each such value, in their order.  It takes the value, and hands on
   the one that comes next, the last one the chain's state.  So when it runs in backward, all that comes to later values
   and to the state is known, and what it returns for its value is added by autograd to what other readers give;
2. a join returns what is missing (:mod:`mfx.run.beside.scout`) if its value is *watched*, and nothing otherwise, at no
   cost;
3. the closing node takes it away again, for the steps will find it once more.

A value is watched if it has a hook or retains its gradient.  Where a backward was asked for the gradients of some
tensors (``torch.autograd.grad``), it cannot be seen of which; then every value that is still alive is.

Known limits: where there are no values (fake tensors) there are no joins.  For a watched value its block and those
after it are run backwards twice.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from mfx.run.beside.scout import Key, Scout
from mfx.run.closing import refuse_double_backward
from mfx.run.tape import Slot
from mfx.run.watched import is_torchs
from mfx.torch_versions import backward_number, keeping_version, when_backward_ends, will_run

_PROBE = torch.empty(0, requires_grad=True)
"""A leaf that every join has as an operand: a backward reaches it, unless it was asked for the gradients of others."""


class Joins:
    """The joins of one segment; they alone hold it.

    Args:
        close: the context of the segment's closing node.
        begin: the first step of the segment.
        steps: the contexts of its steps.
        keys: which values the closing node hands out.
    """

    def __init__(self, close: Any, begin: int, steps: Sequence[Any], keys: Sequence[Key]) -> None:
        self.close, self.begin, self.steps, self.keys = close, begin, steps, keys
        self.eyes: list[tuple[Key, Eye]] = []
        self.scouts: dict[int, Scout] = {}

    def missing(self, number: int, next_grads: Sequence[Tensor | None]) -> Tensor | None:
        """What a join returns for its value, once it is known what comes to what it hands on."""
        refuse_double_backward(self.close.left.setting.chain)
        scout, (key, eye) = self._scout(), self.eyes[number]
        if number + 1 < len(self.eyes):
            scout.note(self.eyes[number + 1][0], next_grads[0])
        else:
            scout.begin_with(*next_grads)
        return scout.missing(key) if eye.is_watched() else None

    def corrected(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients that came to the closing node's values, without what joins gave."""
        scout = self.scouts.pop(backward_number(), None)
        if scout is None:
            return list(grads)
        first = self.eyes[0][0]
        scout.note(first, grads[self.keys.index(first)])
        return [scout.corrected(key, grad) for key, grad in zip(self.keys, grads, strict=True)]

    def _scout(self) -> Scout:
        number = backward_number()
        if number not in self.scouts:
            self.scouts[number] = Scout(self.close, self.begin, self.steps)
            when_backward_ends(partial(self.scouts.pop, number, None))
        return self.scouts[number]


class Eye:
    """Tells whether somebody wants the whole gradient of a value.

    Hooks outlive the value's object, in its node.  So they go to a table that is there from the start.
    """

    def __init__(self, value: Tensor) -> None:
        if value._backward_hooks is None:
            value.register_hook(_nothing).remove()
        else:
            # It was given hooks before it became part of this graph.
            value.grad_fn._register_hook_dict(value)  # type: ignore[union-attr]
        self.value = TensorWeakRef(value)
        self.hooks = weakref.ref(value._backward_hooks)  # type: ignore[arg-type]

    def is_watched(self) -> bool:
        """Whether somebody does, or may."""
        if not all(_waits_for_the_moment(hook) for hook in (self.hooks() or {}).values()):
            return True
        value = self.value()
        return value is not None and (value.retains_grad or not will_run(_PROBE))


class Join(torch.autograd.Function):
    """``(value, others) -> others``; ``kept`` says that the others are somebody's, and stay the same objects."""

    @staticmethod
    def forward(ctx: Any, joins: Joins, number: int, kept: bool, probe: Tensor, value: Tensor, *others: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.joins, ctx.number = joins, number
        if kept:
            ctx.mark_dirty(*others)
            return others
        return tuple(other.detach() if isinstance(other, Tensor) else other for other in others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, None, None, ctx.joins.missing(ctx.number, grads), *grads


def joined(
    slot: Slot,
    begin: int,
    steps: Sequence[Any],
    state: tuple[Any, Any],
    keys: Sequence[Key],
    values: list[Any],
    held: int,
) -> tuple[Any, ...]:
    """The state and the values that a closing node hands out, each behind the join of the one before.

    The last ``held`` of the values are tensors that hooks and modules kept; they are the same objects afterwards.
    """
    wanted = [place for place, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
    if not wanted:
        return *state, *values
    wanted.sort(key=keys.__getitem__)
    joins = Joins(state[0].grad_fn, begin, steps, keys)
    slot.joins = weakref.ref(joins)
    for number, place in enumerate(wanted[:-1]):
        following = wanted[number + 1]
        kept = following >= len(values) - held
        with keeping_version((values[following],) if kept else ()):
            (values[following],) = Join.apply(joins, number, kept, _PROBE, values[place], values[following])  # type: ignore[misc]
    state = Join.apply(joins, len(wanted) - 1, False, _PROBE, values[wanted[-1]], *state)  # type: ignore[assignment]
    joins.eyes += [(keys[place], Eye(values[place])) for place in wanted]
    return *state, *values


def _nothing(grad: Tensor) -> None:
    """A hook that does nothing."""


def _waits_for_the_moment(hook: Any) -> bool:
    """Whether a hook is torch's own: sharding learns so that a backward begins, and does not look at the value."""
    if not is_torchs(hook):
        return False
    inner = inspect.getclosurevars(hook).nonlocals.get("fn") if inspect.isfunction(hook) else None
    return inner is None or is_torchs(inner)
