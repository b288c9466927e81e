"""Frozen: what a symbolic trace reads once, which may have been otherwise.

:class:`Guards` are what may be frozen, since it can be looked at again: the training flags, simple attributes and
children of every module that the tracing entered, and, of modules taken whole, what a plan depends on.  A graph is used
only while its guards hold, so that a mode or setting of one call never leaks into a later one (M1).

What cannot be guarded is refused: draws of Python's, NumPy's or torch's generators, writes to tensors made without
regard to the inputs, attributes that a forward sets, modes that it leaves switched, and arguments that hold what may be
another thing the next time.

Known limits: module-level globals and class attributes are not guarded.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mfx.capture.tracer import Constant, Tracer
from mfx.capture.values import contents_kept
from mfx.errors import CaptureError
from mfx.graph.notes import ADDED, Modes
from mfx.graph.resources import aliased, writes
from mfx.sharding import is_distributed
from mfx.torch_versions import GLOBAL_HOOKS, without_modes

_OURS = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(fx.__file__))
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Attributes of these types are compared by value; tensors that are no buffers by identity."""
_MISSING = object()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLANNED_BY = ("p", "dropout", "inplace")
"""The attributes of modules taken whole that a plan depends on (:mod:`mfx.graph.operations`)."""


@dataclass(frozen=True)
class Guards:
    """What a graph froze.

    ``seen``: (module or None for the root, table, key, value) of attributes and children; ``parameters``: the
    names of the parameters of modules taken whole; ``children``: the names of the children of modules that were
    entered or passed by on the way (a list of blocks); ``classes``: what each of all these was; ``ties``: the places of
    each tensor that was a parameter in several; ``around`` whether torch.distributed runs code around what was entered.
    """

    seen: tuple[tuple[nn.Module | None, str, str, Any], ...]
    parameters: tuple[tuple[nn.Module, tuple[str, ...]], ...]
    children: tuple[tuple[nn.Module | None, tuple[str, ...]], ...]
    classes: tuple[tuple[nn.Module, type], ...]
    ties: tuple[tuple[tuple[nn.Module | None, str], ...], ...]
    around: tuple[tuple[nn.Module, bool], ...]

    @staticmethod
    def of(tracer: Tracer) -> Guards:
        """What ``tracer`` has read."""
        root = tracer.entered[""]
        seen: list[tuple[nn.Module | None, str, str, Any]] = []
        for path, module in tracer.entered.items():
            kinds = (*_SIMPLE, torch.Tensor)
            simple = [(key, value) for key, value in module.__dict__.items() if isinstance(value, kinds)]
            seen += [(module if path else None, "", key, value) for key, value in simple]
        passed = {**tracer.entered, **_containers(tracer, root)}
        for path, module in passed.items():
            children = [(key, child) for key, child in module._modules.items() if key not in ADDED]
            seen += [(module if path else None, "_modules", key, child) for key, child in children]
        whole = [inner for module in tracer.called.values() for inner in module.modules()]
        for module in whole:
            seen += [(module, "", key, module.__dict__[key]) for key in _PLANNED_BY if key in module.__dict__]
            seen += [(module, "_modules", key, child) for key, child in module._modules.items()]
        inner = [module for path, module in passed.items() if path]
        return Guards(
            tuple(seen),
            tuple((module, _parameter_names(module)) for module in whole),
            tuple((module if path else None, _child_names(module)) for path, module in passed.items()),
            tuple((module, type(module)) for module in (*inner, *whole)),
            _ties(root),
            tuple((module, is_distributed(module)) for path, module in tracer.entered.items() if path),
        )

    def hold(self, root: nn.Module) -> bool:
        """Whether everything is still as it was seen."""
        for module, table, key, value in self.seen:
            owner = root if module is None else module
            entries = owner.__dict__ if table == "" else owner.__dict__[table]
            now = entries[key] if key in entries else _MISSING  # noqa: SIM401  # scripted modules have no get
            if now is not value and not _same(now, value):
                return False
        return (
            all(_parameter_names(module) == names for module, names in self.parameters)
            and all(_child_names(root if module is None else module) == names for module, names in self.children)
            and all(type(module) is kind for module, kind in self.classes)
            and all(_are_one(root, tie) for tie in self.ties)
            and all(is_distributed(module) is was for module, was in self.around)
        )


def _containers(tracer: Tracer, root: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold what was entered or called, and were neither themselves (lists of blocks)."""
    paths = {*tracer.entered, *tracer.called}
    above = {path[:place] for path in paths for place, letter in enumerate(path) if letter == "."}
    return {path: root.get_submodule(path) for path in sorted(above - paths)}


def _are_one(root: nn.Module, places: tuple[tuple[nn.Module | None, str], ...]) -> bool:
    held = [(root if module is None else module)._parameters.get(name) for module, name in places]
    return all(parameter is held[0] for parameter in held)


def _child_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in module._modules if name not in ADDED)


def _ties(root: nn.Module) -> tuple[tuple[tuple[nn.Module | None, str], ...], ...]:
    """The places of each parameter that has several."""
    places: dict[int, list[tuple[nn.Module | None, str]]] = {}
    for path, parameter in root.named_parameters(remove_duplicate=False):
        owner, _, name = path.rpartition(".")
        places.setdefault(id(parameter), []).append((root.get_submodule(owner) if owner else None, name))
    return tuple(tuple(found) for found in places.values() if len(found) > 1)


def _parameter_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in module._parameters.items() if parameter is not None)


@contextlib.contextmanager
def modes_kept(root: nn.Module) -> Iterator[None]:
    """Refuse a forward that ends in another grad mode than it began in, and go back to that."""
    before = Modes.current()
    try:
        yield
        if Modes.current() != before:
            raise CaptureError(
                f"{type(root).__name__}.forward leaves another grad mode or autocast behind than it found, which a "
                "captured graph would not repeat: switch it in a with statement (with torch.set_grad_enabled(...):)"
            )
    finally:
        torch.set_grad_enabled(before.grad)


def generator_states() -> tuple[Any, ...]:
    """The states of the generators that a forward may draw from."""
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    drawn = numpy.random.get_state() if numpy is not None else (0, [0])
    return (python, drawn[2:], list(drawn[1])), torch.get_rng_state()


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the random generators as they are."""
    numpy = sys.modules.get("numpy")
    python, of_numpy = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


@contextlib.contextmanager
def apart(root: nn.Module) -> Iterator[None]:
    """Run the model once more, unseen: attributes, what they hold, and generators stay; no hook or mode sees it."""
    before = remembered(root)
    everywhere = [dict(hooks) for hooks in GLOBAL_HOOKS]
    cache = torch.is_autocast_cache_enabled()
    dropped = torch.autograd.graph.saved_tensors_hooks(lambda saved: None, lambda nothing: nothing)
    try:
        for hooks in GLOBAL_HOOKS:
            hooks.clear()
        for module in before:
            module.__dict__.update({name: {} for name in _HOOKS if module.__dict__.get(name)})
        torch.set_autocast_cache_enabled(False)  # a weight that one run has cast, the other would find cast
        with without_modes(), generators_kept(), contents_kept(before), dropped:
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)
        restore(before)
        for hooks, entries in zip(GLOBAL_HOOKS, everywhere, strict=True):
            hooks.update(entries)


def refuse_frozen_draws(before: tuple[Any, ...]) -> None:
    """A draw of a real number while tracing would be in the graph for good."""
    after = generator_states()
    if before[0] != after[0]:
        raise CaptureError(
            "the model's forward draws from Python's or NumPy's random module, and a captured graph would freeze the "
            "draw: draw with torch instead, or keep that module out of the graph with modules="
        )
    if not torch.equal(before[1], after[1]):
        raise CaptureError(
            "the model's forward draws random numbers in a way that a captured graph would freeze "
            "(a module or function outside torch's factories): keep that module out of the graph with modules="
        )


def refuse_written_constants(graph: fx.Graph, root: nn.Module) -> None:
    """A tensor made while tracing is one for all calls; a write to it would be seen by the next."""
    for node in graph.nodes:
        for owner in writes(node, root):
            while (shared := aliased(owner, root)) is not None:
                owner = shared
            if isinstance(owner.target, Constant):
                raise CaptureError(
                    f"the model's forward writes in place ({node}) to a tensor that it makes without regard to its "
                    "inputs, or that is no parameter or buffer; a captured graph would hold one for all calls. Make "
                    "it from an input (x.new_zeros(...), torch.zeros_like(x)), register it as a buffer, or take the "
                    "module whole with modules="
                )


Before = dict[nn.Module, tuple[dict[str, Any], dict[str, dict[str, Any]]]]
"""The attributes of modules, and the entries of their tables."""


def remembered(root: nn.Module) -> Before:
    """What the modules of ``root`` have now."""
    found: Before = {}
    for module in root.modules():
        tables = {name: module.__dict__.get(name) for name in ("_parameters", "_buffers", "_modules")}
        entries = {name: dict(table) for name, table in tables.items() if isinstance(table, dict)}
        found[module] = dict(module.__dict__), entries
    return found


def refuse_assignments(before: Before, tracer: Tracer) -> None:
    """An attribute that a forward sets would be set by no graph."""
    for path, module in tracer.entered.items():
        attributes, tables = before[module]
        pairs = [(attributes, module.__dict__), *((was, module.__dict__[name]) for name, was in tables.items())]
        for was, now in pairs:
            for key, value in now.items():
                if was.get(key, _MISSING) is not value and not (key in was and _same(was[key], value)):
                    if _written_in_place(value, f"{path}.{key}" if path else key, tracer.root):
                        continue
                    raise CaptureError(
                        f"{type(module).__name__}.forward of module {path or '(root)'!r} sets self.{key}, which a "
                        "captured graph would not repeat: return the value instead, write to a buffer in place, or "
                        "take the module whole with modules="
                    )


def _written_in_place(value: Any, path: str, root: nn.Module) -> bool:
    """Whether the value is the tensor of this path itself, after a write to it (``self.count += 1``)."""
    node = value.node if isinstance(value, fx.Proxy) else None
    while node is not None and node.op != "get_attr":
        node = next(iter(writes(node, root)), None)
    return node is not None and node.target == path


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and isinstance(one, _SIMPLE) and one == other


def restore(before: Before) -> None:
    """Put the attributes of all modules back to what they were before the trace."""
    for module, (attributes, tables) in before.items():
        now = module.__dict__
        if len(now) != len(attributes) or any(now.get(key) is not attributes[key] for key in attributes):
            now.clear()
            now.update(attributes)
        for name, entries in tables.items():
            if any(now[name].get(key) is not value for key, value in entries.items()) or len(now[name]) != len(entries):
                now[name].clear()
                now[name].update(entries)


def explain(error: Exception, tracer: Tracer, model: nn.Module) -> CaptureError:
    """Name the module and the line where tracing stopped, and what can be done."""
    scope = tracer.failed_in or tracer.current
    module = tracer.entered.get(scope.path, model)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_OURS)]
    where = theirs[-1] if theirs else frames[-1]
    line = f"{where.filename}:{where.lineno}: {where.line}"
    whole = f"take the module whole with modules={scope.path!r}, or a module that holds it; " if scope.path else ""
    return CaptureError(
        f"symbolic tracing stopped in module {scope.path or '(root)'!r} ({type(module).__name__}) at\n"
        f"    {line}\n"
        f"    {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
        f"its Python depends on values that are known only at run time. Remedies: {whole}momentumize the parts that "
        "can be followed, each in its place (model.backbone = mfx.momentumize(model.backbone)); or rewrite that line "
        "so that it does not branch on tensors."
    )
