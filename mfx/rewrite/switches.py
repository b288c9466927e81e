"""Switches: the grad mode and autocast of each node, in a graph that runs as a whole.

Nodes carry the modes that they ran under (:data:`mfx.graph.notes.MODES`).  Whoever emits them one by one says under
which modes each is to run, and between nodes of different modes an :func:`enter` or :func:`leave` is put; so nodes
may be put in another order, and a branch has no switch but its own.  What an error leaves entered is left by
:func:`all_left`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import fx

from mfx.graph.notes import MODES, Modes, switched


class _Open(threading.local):
    """What is entered now, in this thread."""

    def __init__(self) -> None:
        self.contexts: list[contextlib.AbstractContextManager[None]] = []


_open = _Open()


def enter(grad: bool | None, inference: bool | None, autocast: tuple[tuple[str, bool, torch.dtype], ...]) -> None:
    """Run what follows under these modes (:func:`mfx.graph.notes.switched`)."""
    context = switched(grad, inference, autocast)
    context.__enter__()
    _open.contexts.append(context)


def leave() -> None:
    """Go back to the modes from before the last :func:`enter`."""
    _open.contexts.pop().__exit__(None, None, None)


@contextlib.contextmanager
def all_left() -> Iterator[None]:
    """Around code with switches: leave, in the end, what it has entered."""
    depth = len(_open.contexts)
    try:
        yield
    finally:
        while len(_open.contexts) > depth:
            leave()


def has_switches(graph: fx.Graph) -> bool:
    """Whether there is one in the graph."""
    return any(node.target is enter for node in graph.nodes)


class Switches:
    """Puts switches into a graph that is being built, whose surroundings run under ``base``; None where not known."""

    def __init__(self, graph: fx.Graph, base: Modes | None) -> None:
        self.graph = graph
        self.base = base
        self.now = base

    @property
    def noted(self) -> bool:
        """Whether nodes carry their modes, and what switches them in the original is to be left out."""
        return self.base is not None

    def to(self, modes: Modes | None) -> None:
        """What is added next is to run under ``modes``."""
        if self.base is None or modes is None or modes == self.now:
            return
        if self.now != self.base:
            self.graph.call_function(leave)
        if modes != self.base:
            self.graph.call_function(enter, modes.switch(self.base))  # type: ignore[arg-type]
        self.now = modes

    def before(self, node: fx.Node) -> None:
        """A copy of ``node`` is added next."""
        if node.op not in ("placeholder", "get_attr"):
            self.to(node.meta.get(MODES))

    def end(self) -> None:
        """The graph is about to end."""
        self.to(self.base)
