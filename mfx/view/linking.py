"""Linking: what a report says of chains that the model's own Python joins."""

from __future__ import annotations

from dataclasses import dataclass

from mfx.memory import format_bytes


@dataclass(frozen=True)
class LinkRow:
    """Chains that are one while the Python of the module ``scope`` (the model itself where that is "") runs them so.

    With example inputs, ``state_bytes`` is what a call keeps in which all their blocks run, and ``note`` how.
    """

    scope: str
    chains: tuple[int, ...]
    state_bytes: int | None
    note: str

    @property
    def line(self) -> str:
        """The row as text."""
        chains, scope = ", ".join(map(str, self.chains)), self.scope or "the model's forward"
        kept = (
            "" if self.state_bytes is None else f"; together they keep {format_bytes(self.state_bytes)} ({self.note})"
        )
        return (
            f"chains {chains} are linked while {scope} runs: one that is given what another handed out, as it is, goes "
            f"on from there with its velocity, and a block that a call leaves out is no step{kept}"
        )
