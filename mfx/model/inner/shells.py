"""Shells: the copies of a model's modules that guards are put on, and those on the way to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any
from weakref import ref

from torch import nn

from mfx.capture import as_call, named_modules
from mfx.capture.symbolic import SymbolicCapture
from mfx.errors import CaptureError, PlanChangedError
from mfx.graph.notes import STATE
from mfx.model.checkpointing import switched_off
from mfx.model.generated import copied
from mfx.model.inner.guard import Guard, with_guard
from mfx.model.parts import guarded_in
from mfx.model.saved import saving
from mfx.model.state import Momentum


def replaced(root: nn.Module, chosen: Collection[int], shell: Callable[[nn.Module, bool], nn.Module]) -> nn.Module:
    """``root`` with shells of the modules whose ids are chosen, and of those on the way to them.

    ``shell(module, outer)`` makes one; it needs a table of children of its own if it is an ``outer`` one.  A module has
    one shell, however it is reached.
    """
    made: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            outer = any(id(inner) in chosen for inner in module.modules() if inner is not module)
            made[id(module)] = mm = shell(module, outer) if outer or id(module) in chosen else module
            if outer:
                held = list(mm._modules.items())
                mm._modules.update({name: child and visit(child) for name, child in held})  # type: ignore[misc]
        return made[id(module)]

    return visit(root)


def guards_of(root: nn.Module, sides: Iterable[Momentum]) -> dict[int, Guard]:
    """The guards of the modules of ``root`` that run blocks of the chains of ``sides``, by the module's id."""
    found: dict[int, Guard] = {}
    places = [(path, module) for path, module in root.named_modules(remove_duplicate=False) if path]
    for side in sides:
        whole = set(named_modules(root, side.options).values())
        holding: dict[str, list[str]] = {}
        for name in side.blocks():
            path = name.partition("#")[0]
            if side.options.kind == "branch" and path in whole:
                path = path.rpartition(".")[0]  # what adds it to x
            while path and path != side.place.prefix:
                holding.setdefault(path, []).append(name)
                path = path.rpartition(".")[0]
        for path, module in places:
            if path in holding and _can_be_guarded(module):
                before = found.get(id(module), Guard((), (), ()))
                owners = tuple(dict.fromkeys((*before.owners, ref(side))))
                names = (*before.names, *holding[path])
                found[id(module)] = Guard(owners, (*before.paths, path), names, before.whole or path in whole)
    return found


def _can_be_guarded(module: nn.Module) -> bool:
    """Whether it has a forward, in its class, and no chains of its own."""
    unset = type(module).forward is nn.Module.forward
    return not unset and "forward" not in module.__dict__ and STATE not in module.__dict__


def guarded_shell(module: nn.Module, outer: bool, guards: Mapping[int, Guard]) -> nn.Module:
    """``module`` with its guard, if it has one; with its own tables, if it is an ``outer`` one."""
    mm = copied(module) if outer else module
    guard = guards.get(id(module))
    if guard is None:
        return saving(mm) if outer else mm
    return with_guard(mm, guard)


def note_guards(mm: nn.Module) -> None:
    """Tell each owner in ``mm`` where its guarded modules stand."""
    for module in mm.modules():
        side = module.__dict__.get(STATE)
        if isinstance(side, Momentum):
            side.inner = guarded_in(module)


def guard_below(mm: nn.Module, momentum: Momentum, example_inputs: Any) -> None:
    """Put guards into a model that is captured whole, and see that its capture holds for it then.

    A model that keeps such modules elsewhere than in its children stays as it is.
    """
    guards = guards_of(mm, [momentum])
    if not guards:
        return
    before = dict(mm._modules)
    replaced(mm, guards, lambda module, outer: mm if module is mm else guarded_shell(module, outer, guards))
    try:
        _capture_anew(mm, momentum, example_inputs)
    except (CaptureError, PlanChangedError):
        mm._modules.update(before)
    note_guards(mm)


def _capture_anew(mm: nn.Module, momentum: Momentum, example_inputs: Any) -> None:
    """Capture once more what was captured, now that other modules stand there; where that fails, nothing changes."""
    (old,) = momentum.entries
    call = None if example_inputs is None else as_call(example_inputs)
    momentum.entries = []
    try:
        with switched_off(mm):
            if isinstance(old.captured, SymbolicCapture):
                entry = momentum.capture_form(mm, old.captured.form, call)
                same = str(entry.captured.graph) == str(old.captured.graph)
                momentum.entries = [replace(entry, proven=old.proven and same)]
            elif call is not None:
                momentum.entry(mm, call)
    except (CaptureError, PlanChangedError):
        momentum.entries = [old]
        raise
