"""Handover: the state between two linked chains, which one of them holds at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mfx.errors import changed_in_place
from mfx.memory import kept_aside

State = tuple[Tensor, "Tensor | None"]
Found = tuple[State, "Tensor | None"]
"""A state, and its counts of zeros."""


class Handover:
    """The state after a segment of a linked chain: here, or with the segment that went on from it.

    ``zeros`` are the counts of :mod:`mfx.rule.arithmetic.zeros` up to there.  What took the state over gives it back
    when it is undone in backward; where it is not, ``takers`` find it.
    """

    def __init__(self, state: State, zeros: Tensor | None) -> None:
        self.takers: list[Callable[[], Found]] = []
        self.give(state, zeros)
        kept_aside(self)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are held here."""
        return () if self.state is None else tuple(one for one in (*self.state, self.zeros) if one is not None)

    def give(self, state: State | None, zeros: Tensor | None = None) -> None:
        """Hold a state here."""
        self.state, self.zeros = state, zeros
        self.version = None if state is None else state[0]._version

    def take(self, taker: Callable[[], Found]) -> None:
        """Let the state go: ``taker`` has it now."""
        self.takers.append(taker)
        self.give(None)

    def get(self, chain: str) -> Found:
        """The state."""
        if self.state is None:
            if not self.takers:
                raise RuntimeError(
                    f"{chain}: backward a second time, after its state was let go: use retain_graph=True"
                )
            self.give(*self.takers[-1]())
        assert self.state is not None
        if self.state[0]._version != self.version:
            raise changed_in_place(f"an output of {chain}, or a value it keeps,")
        return self.state, self.zeros

    def clear(self) -> None:
        """Let all go."""
        self.takers = []
        self.give(None)
