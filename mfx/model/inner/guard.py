"""Guard: a module that runs blocks of a momentum chain raises where it is called by itself (M13).

The module that owns a chain runs it whole, as a captured graph.  A stack or a block inside of it, called by hand or by
a model's own checkpointing, would run without the chain's velocity: the plain network.

1. A guarded module is another object, of a generated class whose forward asks its :class:`Guard` first, with the very
   attributes of the model's module (M4).  Modules that are only a part of a branch are not guarded: they compute the
   same everywhere.
2. It is let through where a capture or a proof follows it, where gamma is 0 for all its blocks (then the plain network
   is the same function), and where it no longer is in the momentumized model: a block that was taken out of it, or
   copied by itself, is the plain block.
3. A module that the model's own Python calls outside of its captured parts is *free*: there it is kept as it is.
4. A module taken whole as a block (``modules=``) is called by the captured graph itself, which says so
   (:func:`mfx.graph.notes.calling_whole`); what it does inside is its own, so that its ``__call__`` is what asks.

What is put in place later (``mm.blocks[0] = Block()``) would have no guard and not be in the original: it is an error
(:func:`mfx.model.parts.refuse_replaced`).

Known limits: a module with a forward of its own on the instance has no guard; of a module taken whole,
``module.forward(x)`` does not ask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

from mfx.capture.dynamo import capturing
from mfx.capture.tracer import follower
from mfx.compile.inside import traced_within
from mfx.errors import EntryError
from mfx.graph.notes import GUARD, is_called_whole
from mfx.model.state import Momentum
from mfx.torch_versions import fsdp_shared

_COMPILED = "_compiled_call_impl"
"""Where ``module.compile()`` keeps what it made."""


@dataclass(eq=False)
class Guard:
    """What a module runs a part of: at ``paths``, the blocks ``names`` of the owners whose sides are ``owners``.

    Owners hold what is guarded, so that it holds no owner: a cycle would outlive the model.
    """

    owners: tuple[ReferenceType[Momentum], ...]
    paths: tuple[str, ...]
    names: tuple[str, ...]
    whole: bool = False
    free: bool = False
    compiled: Any = None

    @property
    def sides(self) -> tuple[Momentum, ...]:
        """The sides of the owners that there still are."""
        return tuple(side for side in (owner() for owner in self.owners) if side is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owners": self.sides, "compiled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, owners=tuple(map(ref, state["owners"])))

    def check(self, module: nn.Module) -> None:
        """Let the call of ``module`` through.

        Raises:
            EntryError: it would be the plain network.
        """
        if self.free or is_called_whole():
            return
        who, sides = follower(), self.sides
        if any(side.recorded is not None for side in sides) and not isinstance(who, Momentum):
            self.free = True  # the model itself, on its way to the owners, calls it
            return
        inside = [side for side in sides if self._is_momentum(side) and _is_inside(module, side)]
        if who is not None or not inside:
            return
        path, owner, kind = self.paths[0], inside[0].place.prefix, inside[0].original.__name__
        by = f"{owner!r} ({kind})" if owner else kind
        raise EntryError(
            f"{path!r} ({type(module).__name__}) is part of a chain of momentum steps ({_shown(self.names)}) that "
            f"{by} runs whole; called by itself it would be the plain network, without the chain's velocity. Call "
            f"{by}; for the plain network call {path!r} of the original model, or mfx.set_gamma(mm, 0). Where the "
            "model's own checkpointing calls its blocks one by one, switch that off: chains recompute them anyway"
        )

    def _is_momentum(self, side: Momentum) -> bool:
        return any(name in side.blocks() and side.options.moves(name) for name in self.names)


def _is_inside(module: nn.Module, side: Momentum) -> bool:
    return any(inner is module for holder in side.holders for inner in holder.modules())


def _shown(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"


def with_guard(module: nn.Module, guard: Guard) -> nn.Module:
    """``module`` as another object, of a class that asks ``guard`` first; it has the very attributes of ``module``."""
    mm = _rebuild(type(module), guard)
    object.__setattr__(mm, "__dict__", module.__dict__)
    fsdp_shared(module, mm)
    return mm


def _guarded_class(original: type[nn.Module], guard: Guard) -> type[Any]:
    """A subclass for one object, whose forward (``__call__`` of what is taken whole) asks first.

    The class has the guard, and what ``module.compile()`` makes: the object's attributes are the original's too.
    """
    method = "__call__" if guard.whole else "forward"

    @functools.wraps(getattr(original, method))
    def asking(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            guard.check(self)
        elif not capturing.on:
            traced_within(self, getattr(self, GUARD))
        return getattr(original, method)(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state = dict(self.__dict__)
        state.pop(_COMPILED, None)
        return _rebuild, (original, guard), state

    def to_script(self: nn.Module) -> Any:
        guard.check(self)
        plain = nn.Module.__new__(original)
        plain.__dict__.update(self.__dict__)
        return plain

    namespace = {
        GUARD: guard,
        method: asking,
        _COMPILED: property(lambda self: guard.compiled, lambda self, made: setattr(guard, "compiled", made)),
        # Called by torch.jit.script before anything else.
        "__prepare_scriptable__": to_script,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), namespace)


def _rebuild(original: type[nn.Module], guard: Guard) -> nn.Module:
    """A guarded module without attributes."""
    created = _guarded_class(original, guard)
    return nn.Module.__new__(created)
