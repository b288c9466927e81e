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
import enum
import inspect
import numbers
import os
import random
import sys
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from mfx.capture.call import Form, Input
from mfx.capture.tracer import Constant, Tracer
from mfx.capture.values import contents_kept
from mfx.errors import CaptureError
from mfx.graph.notes import ADDED, Modes
from mfx.graph.writes import aliased, writes
from mfx.torch_versions import GLOBAL_HOOKS, pytree, without_modes

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
    names of the parameters of modules taken whole.
    """

    seen: tuple[tuple[nn.Module | None, str, str, Any], ...]
    parameters: tuple[tuple[nn.Module, tuple[str, ...]], ...]

    @staticmethod
    def of(tracer: Tracer) -> Guards:
        """What ``tracer`` has read."""
        seen: list[tuple[nn.Module | None, str, str, Any]] = []
        for path, module in tracer.entered.items():
            owner = module if path else None
            kinds = (*_SIMPLE, torch.Tensor)
            simple = [(key, value) for key, value in module.__dict__.items() if isinstance(value, kinds)]
            seen += [(owner, "", key, value) for key, value in simple]
            children = [(key, child) for key, child in module._modules.items() if key != ADDED]
            seen += [(owner, "_modules", key, child) for key, child in children]
        whole = [inner for module in tracer.called.values() for inner in module.modules()]
        for module in whole:
            seen += [(module, "", key, module.__dict__[key]) for key in _PLANNED_BY if key in module.__dict__]
            seen += [(module, "_modules", key, child) for key, child in module._modules.items()]
        return Guards(tuple(seen), tuple((module, _parameter_names(module)) for module in whole))

    def hold(self, root: nn.Module) -> bool:
        """Whether everything is still as it was seen."""
        for module, table, key, value in self.seen:
            owner = root if module is None else module
            entries = owner.__dict__ if table == "" else owner.__dict__[table]
            now = entries[key] if key in entries else _MISSING  # noqa: SIM401  # scripted modules have no get
            if now is not value and not _same(now, value):
                return False
        return all(_parameter_names(module) == names for module, names in self.parameters)


def _parameter_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, parameter in module._parameters.items() if parameter is not None)


_PLAIN = (numbers.Number, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout)
_PLAIN = (*_PLAIN, torch.memory_format, torch.Generator, enum.Enum, type, types.BuiltinFunctionType, Input)
"""Arguments of these types are what they are, or (a generator) looked at by torch alone."""


def refuse_objects(forward: Any, form: Form) -> None:
    """An object among the arguments may hold other tensors the next time, and a graph would hold the first ones."""
    args, kwargs = form.fill(leaf for leaf in form.leaves if isinstance(leaf, Input))
    try:
        named = inspect.signature(forward).bind(None, *args, **kwargs).arguments
    except TypeError:
        named = {f"input {place}": leaf for place, leaf in enumerate(form.leaves)}
    for name, value in named.items():
        for leaf in pytree.tree_leaves(value):
            if not _is_plain(leaf):
                raise CaptureError(
                    f"the argument {name!r} holds a {type(leaf).__module__}.{type(leaf).__qualname__}, and a "
                    "symbolically captured graph would hold what is in it now for good: pass tensors, numbers, "
                    "strings and containers of them, or let Dynamo follow the object (capture='dynamo' or 'auto')"
                )


def _is_plain(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None and not value.__dict__
    if isinstance(value, slice):
        return all(map(_is_plain, (value.start, value.stop, value.step)))
    if isinstance(value, (range, torch.Size)):
        return True
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_plain, value))
    if is_dataclass(value) and not isinstance(value, type):
        frozen = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return frozen and all(_is_plain(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, _PLAIN)


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
