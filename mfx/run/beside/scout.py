"""Scout: goes through a segment ahead of its backward, for what comes to values from inside its branches.

A value ``e`` from inside the branch of step k is read by the rest of that branch, and maybe by later steps of the
segment.  What comes to it from there, beside what its other readers give, is found before the segment's own backward
begins (:mod:`mfx.run.beside.joining` says why), from the end of the segment down to the step:

1. the steps after k are undone and differentiated by x and by what they read of earlier steps, as backward will do;
2. the branch of k runs once more, with its graph.  Its outputs are ``F`` and ``e_0 ... e_m``, with cotangents ``G`` and
   ``c_0 ... c_m``.  Values are asked for from the last to the first, for a later one may be computed from an earlier
   one, so that ``given_i = d(<F, G> + sum_{j > i} <e_j, c_j>) / d e_i + s_i``, where ``s_i`` comes from later steps;
3. where ``T_i`` is what has come to ``e_i`` in the end, ``c_i = T_i + s_i - given_i``.  The graph of the branch adds
   the first term of ``given_i`` again, so what passes ``e_i`` is ``T_i``, as in plain autograd, also where a hook
   changed it.  Where nothing was given, ``c_i = T_i + s_i``.  Backward itself gets the same cotangents.

Known limits: where ``given_i`` is not finite, neither is ``c_i``, and NaN stands for infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfx.errors import BackwardError
from mfx.rule.step import Escape, State, added, cotangents
from mfx.run.chain import gradient_dtype
from mfx.run.closing import rewind_of
from mfx.run.recompute import Opened, Rerun, saved_tensors
from mfx.run.uninverted.kept import Alive

Key = tuple[int, int]
"""Which value: the step, and its number among all that leave the step's branch."""


@dataclass(frozen=True, eq=False)
class Visited:
    """A step that is undone next: x and v before it where they are known, and the gradients around it."""

    rerun: Rerun | Alive
    x: Tensor
    inside: Tensor
    v: Tensor | None
    v_after: Tensor | None
    own_x: Tensor | None
    own_v: Tensor | None
    pulled: Tensor | None
    opened: Opened


class Scout:
    """One backward's way through a segment; see the module.

    Args:
        close: the context of the segment's :class:`mfx.run.closing.Close`.
        begin: the first step of the segment.
        steps: the contexts of its steps.
    """

    def __init__(self, close: Any, begin: int, steps: Sequence[Any]) -> None:
        self.close, self.begin, self.steps = close, begin, steps
        self.came: dict[Key, Tensor | None] = {}
        self.given: dict[Key, Tensor | None] = {}
        self.of_state: tuple[Tensor | None, Tensor | None] = (None, None)
        self._rewind: Any = None
        self._read: dict[State | Key, Tensor] = {}
        self._visited: Visited | None = None
        self._unseen: dict[Key, Key] = {}

    def begin_with(self, grad_x: Tensor | None, grad_v: Tensor | None = None) -> None:
        """Take what has come to the state after the segment."""
        self.of_state = (grad_x, grad_v)

    def note(self, key: Key, grad: Tensor | None) -> None:
        """Take the whole of what has come to a value.

        Raises:
            BackwardError: it has readers outside of the segment, and another value was asked for too soon.
        """
        self.came[key] = grad
        given = self.given.get(key)
        if key in self._unseen and grad is not None and (given is None or not torch.equal(grad, given)):
            raise self._out_of_order(self._unseen[key])

    def missing(self, key: Key) -> Tensor | None:
        """What comes to a value from its own branch and from later steps of the segment."""
        if self._nothing_comes():
            return None
        visited = self._go_to(key[0])
        value = visited.opened.values[1 + key[1]]
        # The value is an output of its branch too, with the cotangent of what later steps read.
        found = visited.opened.gradients(self._cotangents(visited), [value])[0]
        if value is visited.opened.entry:
            # The branch's input as a hook saw it: the add reads it as well.
            found = added(found, None if visited.own_x is None else visited.own_x.to(value.dtype))
        self.given[key] = found
        for number in range(key[1]):
            if visited.opened.reads(1 + number, value):
                self._unseen[key[0], number] = key
        return self.given[key]

    def corrected(self, key: Key, grad: Tensor | None) -> Tensor | None:
        """The cotangent of a value in backward, from the whole of what has come to it."""
        given = self.given.get(key)
        return grad if given is None else added(grad, -given)

    def _nothing_comes(self) -> bool:
        grads = (*self.of_state, *self.came.values(), *self._read.values())
        return all(grad is None for grad in grads)

    def _go_to(self, index: int) -> Visited:
        """The step, with all after it undone."""
        if self._rewind is None:
            self._rewind = rewind_of(self.close)
        while self._visited is None or self._visited.rerun.index > index:
            if self._visited is not None:
                self._undo(self._visited)
            self._visited = None
            self._visited = self._visit(self._rewind.position - 1)
        return self._visited

    def _visit(self, index: int) -> Visited:
        """The state before a step, and its branch once more."""
        ctx = self.steps[index - self.begin]
        rerun: Rerun | Alive = ctx.rerun
        x, v, after = self._rewind.before(index)
        inside, _ = rerun.setting.carry.enter(index, x, v)
        saved = saved_tensors(ctx, f"a parameter or side input of block {rerun.step.name!r}")
        grad_x, grad_v = self.of_state
        read = self._read.pop(State(index), None)
        own_x, own_v, pulled = cotangents(rerun.step, added(grad_x, _as(read, grad_x)), grad_v)
        opened = rerun.opened(inside, rerun.operands(iter(saved)))
        return Visited(rerun, x, inside, v, after[1], own_x, own_v, pulled, opened)

    def _undo(self, visited: Visited) -> None:
        """Go on to the state before a step, with its gradients and those of what the step reads of earlier ones."""
        rerun, index = visited.rerun, visited.rerun.index
        sides = rerun.step.sides
        grads = visited.opened.gradients(self._cotangents(visited), visited.opened.leaves[: 1 + len(sides)])
        for side, grad in zip(sides, grads[1:], strict=True):
            if side is not None and side.step >= self.begin:
                key = (side.step, side.number) if isinstance(side, Escape) else side
                total = added(self._read.get(key), grad)
                self._read |= {} if total is None else {key: total}
        v, x = visited.v, visited.x
        if index not in rerun.setting.plan.snapshots and not rerun.step.rule.forgets:
            assert visited.v_after is not None
            value = visited.opened.values[0].detach()
            v = rerun.setting.carry.v_before(index, visited.inside, visited.v_after, value)
        self._rewind.leave(index, x, v)
        grad_x, grad_v = added(visited.own_x, grads[0]), visited.own_v
        dtype = gradient_dtype(rerun.dtype, x.dtype)
        self.of_state = (None if grad_x is None else grad_x.to(dtype), None if grad_v is None else grad_v.to(dtype))

    def _cotangents(self, visited: Visited) -> list[Tensor | None]:
        """Those of all values of a branch."""
        index = visited.rerun.index
        return [visited.pulled, *(self._cotangent((index, n)) for n in range(len(visited.opened.values) - 1))]

    def _cotangent(self, key: Key) -> Tensor | None:
        return self.corrected(key, added(self.came.get(key), self._read.get(key)))

    def _out_of_order(self, key: Key) -> BackwardError:
        step = self.steps[key[0] - self.begin].rerun.step.name
        return BackwardError(
            f"block {step!r}: the gradient of a value from inside its branch is asked for (by a hook, retain_grad or "
            "torch.autograd.grad), and another value that the block keeps is computed from it and noted before it, so "
            "what comes through that one would be missing. Let a hook keep both, ask for one of them only, keep the "
            f"block as it is with exclude={step!r}, or use reversible=False"
        )


def _as(grad: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of another."""
    return grad if grad is None or other is None else grad.to(other.dtype)
