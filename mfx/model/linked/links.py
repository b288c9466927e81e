"""Links: what the parts of a model have in common whose own Python runs them as one chain.

The module in whose forward that Python is, is the *scope*.  While its forward runs, parts find the joint of that call
(:mod:`mfx.run.linked`); a part that is called outside of it would run without the velocity of the others, and raises,
unless gamma is 0 for all of them.

Under ``torch.compile`` the scope's forward is not compiled: Dynamo cannot follow it anyway, and what it would make of
the pieces between two looks at data would know of no chain.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mfx.errors import EntryError
from mfx.graph.notes import LINKS
from mfx.run.linked import Joint, within


class Links:
    """The parts that a ``scope`` links, none where that is None.

    By path, ``gammas`` are those of the blocks of each part, and ``calls`` how often it runs at least.
    """

    def __init__(self, scope: str | None = None) -> None:
        self.scope = scope
        self.gammas: dict[str, tuple[float, ...]] = {}
        self.calls: dict[str, int] = {}
        self._open = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open=threading.local())

    def note(self, part: str, gammas: Sequence[float | None]) -> None:
        """Take the gammas of a part's blocks."""
        self.gammas[part] = tuple(gamma or 0.0 for gamma in gammas)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Around a call of the scope."""
        gammas = [gamma for path, own in self.gammas.items() for gamma in own * self.calls.get(path, 1)]
        outer, self._open.joint = getattr(self._open, "joint", None), Joint(gammas)
        try:
            yield
        finally:
            self._open.joint = outer

    def within(self, part: str) -> contextlib.AbstractContextManager[None]:
        """Around a call of a part.

        Raises:
            EntryError: it would run without the velocity of the others.
        """
        if self.scope is None:
            return contextlib.nullcontext()
        joint = getattr(self._open, "joint", None)
        if joint is None and any(any(own) for own in self.gammas.values()):
            raise EntryError(
                f"{part!r} is one of the blocks that {self.scope or 'the model'} runs as a chain of momentum steps; "
                "called by itself it would run without the chain's velocity. Call "
                f"{self.scope or 'the model'}; for the plain network call the original, or mfx.set_gamma(mm, 0). Where "
                "the model's own checkpointing calls its blocks one by one, switch that off: chains recompute them"
            )
        return within(joint)


@functools.cache
def linking_class(original: type[nn.Module]) -> type[Any]:
    """A subclass whose forward is the scope of the :class:`Links` in its objects."""

    @torch.compiler.disable(reason="the model's own Python links the chains of its blocks while it runs")
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__[LINKS].opened():
            return original.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (original,), dict(self.__dict__)

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), namespace)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """An empty scope, for unpickling."""
    created = linking_class(original)
    return nn.Module.__new__(created)
