"""Undo: the state before a segment that went on from another, where a backward comes to that one alone.

The segment is undone as its backward would do it, without gradient, from the state after it; that may be with the
segment that went on from this one, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mfx.errors import changed_in_place
from mfx.run.closing import Rewind, Turn
from mfx.run.linked.handover import Found, Handover, State
from mfx.run.recompute import Rerun
from mfx.run.tape import Left


class Held:
    """A tensor as it is now, without what it was computed by."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor if tensor.is_leaf else tensor.detach().requires_grad_(tensor.requires_grad)
        self.version = tensor._version

    def value(self, what: str) -> Tensor:
        """The tensor, if nobody changed it."""
        if self.tensor._version != self.version:
            raise changed_in_place(what)
        return self.tensor


@dataclass(frozen=True, eq=False)
class Undo:
    """Gives the state before a segment, by what its forward left, the state after it, and its steps as they ran."""

    left: Left
    end: Handover | None
    snapshots: dict[int, tuple[Held, Held | None]]
    ran: Sequence[tuple[Rerun, tuple[Held, ...]]]

    def __call__(self) -> Found:
        found: list[Found] = []
        name = self.left.setting.chain.name
        end, zeros = (None, None) if self.end is None else self.end.get(name)

        def back(state: State, zeros: Tensor | None) -> None:
            found.append((state, zeros))

        changed = f"an output of {name}, or a value it keeps,"
        kept = {
            index: (x.value(changed), None if v is None else v.value(changed))
            for index, (x, v) in self.snapshots.items()
        }
        rewind = Rewind(replace(self.left, back=back, first=self.left.begin), end, None, kept, zeros)
        for rerun, held in reversed(self.ran):
            turn = Turn(rewind, rerun.index)
            what = f"a parameter or side input of block {rerun.step.name!r}"
            operands: list[Any] = rerun.operands(one.value(what) for one in held)
            if turn.divides:
                rerun.differentiate(turn, operands, (False,), None, ())
            else:
                turn.pass_on(None)
        return found[0]
