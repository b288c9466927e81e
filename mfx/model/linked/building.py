"""Building: a model whose parts its own Python links; see :mod:`mfx.model.linked.links`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from mfx.capture import Call
from mfx.capture.values import Otherwise
from mfx.errors import CaptureError, PlanChangedError
from mfx.graph.notes import LINKS
from mfx.model.checkpointing import switched_off
from mfx.model.generated import copied, shallow_copy
from mfx.model.inner import Guard, guarded_shell, guards_of, note_guards, replaced
from mfx.model.linked.links import Links, linking_class
from mfx.model.linked.traffic import in_a_run
from mfx.model.state import Momentum

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Part:
    """A part as it is to be built: its momentum side, a call of it, how often it ran, and its scope, if it has one."""

    side: Momentum
    call: Call
    count: int
    scope: str | None


def linked_model(model: Model, parts: Mapping[str, Part], call: Call) -> Model | None:
    """``model`` with its ``parts``, by path, as momentum, and with the scopes that link them.

    ``call`` is the one of the model in which parts ran as often as they say.  None where it keeps modules elsewhere
    than in its children, so that it would run the originals.
    """
    links: dict[str, Links] = {}
    for path, part in parts.items():
        if part.scope is not None:
            found = links.setdefault(part.scope, Links(part.scope))
            found.calls[path], part.side.links = max(part.count, 1), found
            part.side.note_moving()
    sides = {id(model.get_submodule(path)): part.side for path, part in parts.items()}
    scopes = {id(model.get_submodule(scope)): found for scope, found in links.items()}
    # What is kept elsewhere than in children may keep guards from being reached: then there are none.
    for guards in (guards_of(model, sides.values()), {}):
        mm = _shells(model, sides, scopes, guards)
        if not _reaches_all(mm, parts, call):
            continue
        try:
            for path, part in parts.items():
                module = mm.get_submodule(path)
                with switched_off(module):
                    part.side.entry(module, part.call)
        except (CaptureError, PlanChangedError, Otherwise):
            continue
        note_guards(mm)
        return mm
    return None


def _reaches_all(mm: nn.Module, parts: Mapping[str, Part], call: Call) -> bool:
    """Whether a run comes to each part as often as one of the original."""

    def counts() -> list[int]:
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(part.side.recording()) for part in parts.values()]
            mm(*call.args, **call.kwargs)
        return list(map(len, found))

    return in_a_run(mm, counts) == [part.count for part in parts.values()]


def _shells(
    model: Model, sides: Mapping[int, Momentum], scopes: Mapping[int, Links], guards: Mapping[int, Guard]
) -> Model:
    """``model`` with parts, scopes and guards in place, each by the id of its module."""

    def shell(module: nn.Module, outer: bool) -> nn.Module:
        if id(module) in sides:
            return shallow_copy(module, sides[id(module)])
        if id(module) not in scopes:
            return guarded_shell(module, outer, guards)
        mm = copied(module)
        mm.__class__ = linking_class(type(module))
        mm.__dict__[LINKS] = scopes[id(module)]
        return mm

    return replaced(model, {*sides, *scopes, *guards}, shell)  # type: ignore[return-value]
