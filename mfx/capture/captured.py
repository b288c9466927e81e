"""Captured: what every capture gives, whichever way it was taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import fx, nn

from mfx.capture.call import Call

Run = Callable[..., Any]


class Captured(Protocol):
    """A model's computation for some of its calls.

    ``graph`` is relative to the root module (parameters, buffers and modules by path) and carries the notes of
    :mod:`mfx.graph.notes`; ``sizes`` are the bytes that its nodes keep for backward, as far as they were measured;
    ``hooked`` the paths of modules whose hooks the graph does not run; ``calls`` how often the forward of each module
    that became part of the graph ran, by path.
    """

    @property
    def graph(self) -> fx.Graph: ...

    @property
    def sizes(self) -> Mapping[fx.Node, int]: ...

    @property
    def calls(self) -> Mapping[str, int]: ...

    @property
    def hooked(self) -> tuple[str, ...]: ...

    def holds(self, root: nn.Module, call: Call) -> bool:
        """Whether this is a capture of ``call``, in the modes and settings of now."""
        ...

    def inputs(self, root: nn.Module, call: Call) -> list[Any]:
        """The values that the graph takes in ``call``."""
        ...

    def call(self, root: nn.Module, call: Call, run: Run) -> Any:
        """The model's output in ``call``, where ``run(root, *inputs)`` computes the graph."""
        ...
