"""Owners: only the smallest modules in whose forward a chain runs whole are captured; the rest stays the model's own.

1. The chains that a capture of the whole model has each belong to the module of the longest path that all their nodes
   ran in, if its forward ran once (:func:`owners_of`); of owners inside one another the outer one counts.
2. The momentumized model is the model with *shells*: shallow copies of the root and of the modules on the way to each
   owner, with everything else shared.  Owners get a momentum side, the rest of the model stays plain Python: losses,
   masks, hooks, methods that call an owner some other way (M13).  Below owners, modules that run a part of a chain
   raise where they are called by themselves (:mod:`mfx.model.inner`).
3. The shells are run once, symbolically or on the example, to see that every owner is reached: a model that keeps
   modules in a plain list, a closure or a bound method would run the originals.  Such a model is captured whole.

4. Where the chains of an owner run in another method that its forward calls (``forward_features``, ``encode``), that
   method is what gets the captured version.  Where they run in several, forward does, and each of these raises when it
   is called alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from mfx.capture import Call, Captured, as_call, capture_symbolic, default_form
from mfx.capture.call import call_form
from mfx.capture.frozen import remembered, restore
from mfx.capture.values import contents_kept
from mfx.errors import CaptureError, PlanChangedError
from mfx.graph.notes import FRAMES, SCOPE
from mfx.model.generated import shallow_copy
from mfx.model.inner import Guard, guarded_shell, guards_of, note_guards, replaced
from mfx.model.state import Entry, Momentum
from mfx.options import Options
from mfx.pipeline import Place
from mfx.plan import Chain
from mfx.sharding import Units

Model = TypeVar("Model", bound=nn.Module)


def _nothing() -> None:
    """Stands for a method that a class does not have."""


def owners_of(entry: Entry) -> dict[str, list[Chain]]:
    """The chains of each owner, by its path; all of them the root's where one is."""
    chains = entry.passed.plan.chains
    found: dict[str, list[Chain]] = {}
    for chain in chains:
        found.setdefault(_owner(chain, entry.captured), []).append(chain)
    if "" in found:
        return {"": list(chains)}
    for inner in sorted(found, key=len, reverse=True):
        outer = next((path for path in found if _inside(inner, path)), None)
        if outer is not None:
            found[outer] += found.pop(inner)
    return found


def _owner(chain: Chain, captured: Captured) -> str:
    """The path of the smallest module that ran once and in whose forward all of ``chain`` ran."""
    paths = [node.meta[SCOPE].path.split(".") for block in chain.blocks for node in block.nodes]
    common = [names[0] for names in zip(*paths, strict=False)]
    shared = next((k for k, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1), len(common))
    common = common[:shared]
    while common and captured.calls.get(".".join(common), 0) != 1:
        common.pop()
    return ".".join(common)


def _inside(inner: str, outer: str) -> bool:
    return inner.startswith(f"{outer}.")


def with_shells(model: Model, captures: Mapping[str, Entry], options: Options, example_inputs: Any) -> Model | None:
    """``model`` with shells down to the owners of the chains in ``captures`` of it, or of its parts, by path.

    None where the root has to be captured.
    """
    sides: dict[str, Momentum] = {}
    for part, entry in captures.items():
        for inner, chains in owners_of(entry).items():
            path = ".".join(filter(None, (part, inner)))
            owner = model.get_submodule(path)
            method = common_method(type(owner), chains)
            if not path and method == "forward":
                return None
            sides[path] = side_of(owner, path, method, entry, options)
    if not sides:
        return None
    owners = {id(model.get_submodule(path)): side for path, side in sides.items()}
    # What is kept elsewhere than in children may keep guards from being reached: then there are none.
    for guards in (guards_of(model, sides.values()), {}):
        mm = _shells(model, owners, guards)
        try:
            if example_inputs is None:
                _capture_by_symbols(mm, sides)
            else:
                _capture_by_example(mm, sides, example_inputs)
        except (CaptureError, PlanChangedError):
            continue
        note_guards(mm)
        return mm
    return None


def methods_of(owner: type[nn.Module], chain: Chain) -> list[list[str]]:
    """For each block of a chain, the methods of its owner that its add ran in, from the outside inwards."""

    def is_own(file: str, name: str) -> bool:
        code = getattr(inspect.unwrap(getattr(owner, name, _nothing)), "__code__", None)
        return name != "forward" and code is not None and (code.co_filename, code.co_name) == (file, name)

    return [[name for file, name in block.add.meta.get(FRAMES, ()) if is_own(file, name)] for block in chain.blocks]


def common_method(owner: type[nn.Module], chains: Sequence[Chain]) -> str:
    """The innermost method of their owner in which all of ``chains`` run."""
    ways = [way for chain in chains for way in methods_of(owner, chain)]
    shared = [name for name in ways[0] if all(name in way for way in ways)] if ways else []
    return shared[-1] if shared else "forward"


def guarded_methods(owner: type[nn.Module], chains: Sequence[Chain]) -> tuple[str, ...]:
    """The methods of an owner that run blocks of its chains, where its forward is captured."""
    return tuple(sorted({name for chain in chains for way in methods_of(owner, chain) for name in way}))


def side_of(
    owner: nn.Module, path: str, method: str, entry: Entry, options: Options, kind: type[Momentum] = Momentum
) -> Momentum:
    """The momentum side of an owner, which has to have the chains that the whole model has there."""
    plan = entry.passed.plan
    numbers = {chain.names[0]: chain.number for chain in plan.chains}
    momentum = kind(type(owner), replace(options, checked=True), Place(path, numbers), method)
    here = {
        name: chain
        for name, chain in plan.places.items()
        if not path or _inside(name, path) or name.partition("#")[0] == path
    }
    if method == "forward":
        momentum.guarded = guarded_methods(type(owner), [chain for chain in plan.chains if chain.names[0] in here])
    momentum.expect(tuple(names for names in plan.names if names[0] in here), here)
    return momentum


def _shells(model: Model, sides: Mapping[int, Momentum], guards: Mapping[int, Guard]) -> Model:
    """``model`` with owners that have their momentum side, and guards below them, both by id."""

    def shell(module: nn.Module, outer: bool) -> nn.Module:
        side = sides.get(id(module))
        return guarded_shell(module, outer, guards) if side is None else shallow_copy(module, side)

    return replaced(model, {*sides, *guards}, shell)  # type: ignore[return-value]


def _capture_by_symbols(mm: nn.Module, sides: Mapping[str, Momentum]) -> None:
    """Capture each owner in the form that the model calls it in, by a trace that takes owners whole."""
    forward = type(mm).forward
    with _recording(sides) as calls:

        def held() -> list[Any]:
            return [call.leaves for found in calls.values() for call in found]

        forms = dict(capture_symbolic(mm, forward, default_form(forward), held=held).forms)
    forms |= {path: call_form(found[0].args, found[0].kwargs) for path, found in calls.items() if len(found) == 1}
    _require_all(mm, sides, list(forms))
    for path, momentum in sides.items():
        momentum.capture_form(mm.get_submodule(path), forms[path])


def _capture_by_example(mm: nn.Module, sides: Mapping[str, Momentum], example_inputs: Any) -> None:
    """Capture each owner for the call that the model makes of it, as a run on the example shows."""
    call = as_call(example_inputs)
    # With gradients where the caller has them on, so that owners are captured for the values that they will get.
    dropped = torch.autograd.graph.saved_tensors_hooks(lambda saved: None, lambda nothing: nothing)
    with untouched(mm), dropped, _recording(sides) as calls:
        mm(*call.args, **call.kwargs)
    _require_all(mm, sides, [path for path, found in calls.items() if len(found) == 1])
    for path, momentum in sides.items():
        momentum.entry(mm.get_submodule(path), calls[path][0])


def _require_all(mm: nn.Module, sides: Mapping[str, Momentum], reached: Sequence[str]) -> None:
    missed = sorted(set(sides) - set(reached))
    if missed:
        raise CaptureError(
            f"{type(mm).__name__}.forward does not reach {', '.join(missed)} by its children: it keeps them elsewhere "
            "(a list, a closure, a bound method)"
        )


def _belongs(name: str, path: str) -> bool:
    """Whether the block of this name runs in the module at ``path``."""
    return not path or _inside(name, path) or name.partition("#")[0] == path


@contextlib.contextmanager
def _recording(sides: Mapping[str, Momentum]) -> Iterator[dict[str, list[Call]]]:
    """The calls of each owner, which runs as the original meanwhile."""
    with contextlib.ExitStack() as stack:
        yield {path: stack.enter_context(momentum.recording()) for path, momentum in sides.items()}


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave buffers, attributes, what they hold, and random generators as they are."""
    attributes = remembered(model)
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {buffer.device.index for buffer in [*model.parameters(), *model.buffers()] if buffer.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), contents_kept(attributes):
            yield
    finally:
        units = Units.of(model.modules())
        if units is not None:
            units.free()
        restore(attributes)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
