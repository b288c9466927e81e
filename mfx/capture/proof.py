"""Proof: whether a captured graph runs what the model's own forward runs, operation by operation (M12).

1. The model's own forward and the graph run on fake tensors under a dispatch mode that logs each operation below
   autograd: its name and operands, the shapes and dtypes of its results, the modes; and each custom Function by name.
2. A value is known by where it comes from: an input, a parameter, the result of an operation.  So logs that agree
   compute the same from the same.  The first difference refuses the capture.
3. Left out are operations whose results nobody uses, and those on constants alone: a capture runs them once.  They run
   for real here, and their results are compared by value where they are used.
4. Where fake tensors do not do (shapes that depend on values, foreign kernels) both run on the real inputs, with the
   generators, buffers and attributes of the model put back.

Known limits: it is about one call; others are for the guards.  What a forward does beside tensors it does once more.
"""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mfx.capture.call import Call
from mfx.capture.frozen import apart, remembered, restore
from mfx.capture.symbolic import SymbolicCapture
from mfx.capture.tracer import following
from mfx.capture.values import Otherwise, contents_kept, functions_kept
from mfx.errors import CaptureError
from mfx.graph.notes import STATE, Modes
from mfx.graph.shapes import Fake, Interpreter, Real, asking
from mfx.sharding import sharded_parameters
from mfx.torch_versions import (
    FakeTensor,
    TorchDispatchMode,
    functions_are_transformed,
    is_recording,
    pytree,
    without_modes,
)

_PASSED_BY = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, os.path.dirname(__file__)))
_now = threading.local()


def prove(root: nn.Module, forward: Callable[..., Any], captured: SymbolicCapture, call: Call) -> bool:
    """Whether ``captured`` is proven for ``call``; False where a proof has to wait for another call.

    That is where a compiler or a transform of functions records what runs, or parameters are lazy or parallel.

    Raises:
        CaptureError: the graph does not run what ``forward`` runs; says where.
    """
    # Lazy tensors have no shape yet; those of tensor parallelism are computed with by hooks, and here none run.
    sharded = set(map(id, sharded_parameters(root)))
    own = (tensor for tensor in (*root.parameters(), *root.buffers()) if id(tensor) not in sharded)
    lazy = any(is_lazy(tensor) or type(tensor).__name__ == "DTensor" for tensor in own)
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if getattr(_now, "at_work", False) or lazy or traced or is_recording() or functions_are_transformed():
        return False
    inputs = captured.inputs(root, call)
    symbolic = any(isinstance(v, torch.Tensor) and (v.is_meta or isinstance(v, FakeTensor)) for v in inputs)
    proof = _Proof(root, forward, captured)
    _now.at_work = True
    try:
        with apart(root):
            try:
                logs = proof.logs(_fake(root, inputs))
            except (CaptureError, Otherwise):
                raise
            except Exception:
                if symbolic or sharded:
                    return False
                logs = proof.logs(Real(root, inputs))
        with without_modes():
            _compare(root, *logs)
    finally:
        _now.at_work = False
    return True


def _fake(root: nn.Module, inputs: list[Any]) -> Fake:
    """A place for fake tensors, those that ask for a gradient asking there too."""
    place = Fake(root, inputs)
    place.tensors = [asking(given, fake) for given, fake in zip(inputs, place.tensors, strict=True)]
    return place


@dataclass(frozen=True)
class _Proof:
    """What is run twice."""

    root: nn.Module
    forward: Callable[..., Any]
    captured: SymbolicCapture

    def logs(self, place: Fake) -> tuple[_Log, _Log]:
        """The logs of the model's own forward and of the graph, run in ``place``."""
        if sum(STATE in module.__dict__ for module in self.root.modules()) > (STATE in self.root.__dict__):
            with place():  # parts with graphs of their own capture them now, and not between two logs
                self.own(place.tensors)
        before = remembered(self.root)
        own = self._log(place, lambda log: self.own(place.tensors))
        restore(before)
        try:
            return own, self._log(place, lambda log: self.graph(place, log))
        except Otherwise:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise _refusal(self.root, f"the model runs to its end\n    the graph stops with {said}") from error

    def own(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs of the model's own forward: their tree, and its leaves."""
        args, kwargs = self.captured.form.fill(inputs)
        with following(self):
            flat, spec = pytree.tree_flatten(self.forward(self.root, *args, **kwargs))
        return [spec, *flat]

    def graph(self, place: Fake, log: _Log) -> list[Any]:
        """Those of the graph."""
        interpreter = Interpreter(self.captured.graph, self.root)
        log.at = lambda: str(interpreter.at)
        flat, spec = pytree.tree_flatten(pytree.tree_unflatten(interpreter.run(*place.tensors), self.captured.out_spec))
        return [spec, *flat]

    def _log(self, place: Fake, run: Callable[[_Log], list[Any]]) -> _Log:
        with place(), contents_kept(self.root.modules()) as changed:
            log = _Log(self.root, place.tensors)
            with functions_kept(log.applied), log:
                log.outputs = run(log)
            log.wrote = changed()
            log.returned = [log.operand(value) for value in log.outputs]
        return log


@dataclass(frozen=True)
class _Of:
    """A value by where it comes from: ``("own", path)``, ``("input", number)``, or operation and number of result."""

    source: Any
    number: Any


@dataclass(eq=False)
class _Row:
    """One operation; ``kept`` says that it is to run even where nobody uses its results."""

    name: str
    operands: list[Any]
    results: list[tuple[Any, ...]]
    modes: Modes
    place: Any
    kept: bool


@dataclass(eq=False)
class _Log(TorchDispatchMode):
    """The operations that run in its context, and whether lists, dicts or sets of the model's own changed."""

    root: nn.Module
    inputs: Sequence[Any]
    rows: list[_Row] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    wrote: bool = False
    at: Callable[[], Any] = lambda: _line()

    def __post_init__(self) -> None:
        super().__init__()
        self.sources: dict[int, _Of] = {}
        self.alive: list[Any] = []
        for path, tensor in (*self.root.named_parameters(), *self.root.named_buffers()):
            self.sources.setdefault(id(tensor), _Of("own", path))
        for number, tensor in enumerate(self.inputs):
            if isinstance(tensor, torch.Tensor):
                self.sources.setdefault(id(tensor), _Of("input", number))

    def operand(self, value: Any) -> Any:
        """A value as it stands in a row: constants are what they are."""
        if isinstance(value, torch.Tensor) and id(value) not in self.sources and value.requires_grad:
            self.alive.append(value)
            self.sources[id(value)] = _Of("outside", id(value))
        return self.sources.get(id(value), value) if isinstance(value, torch.Tensor) else value

    def applied(self, function: type, grad: bool, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """Note that a custom Function is called for more than constants; what else its values are, they are its own."""
        if not any(isinstance(self.operand(value), _Of) for value in pytree.tree_leaves(args)):
            return run()
        number = len(self.rows)
        self.rows.append(_Row(str(function), [], [], Modes.current(), self.at(), True))
        out = run()
        for place, value in enumerate(pytree.tree_leaves(out)):
            if isinstance(value, torch.Tensor) and id(value) not in self.sources:
                self.sources[id(value)] = _Of(number, place)
                self.alive.append(value)
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or str(func).startswith("aten.sym_"):  # a question (device, size), no operation
            return func(*args, **kwargs)
        operands = [self.operand(value) for value in pytree.tree_leaves((args, kwargs))]
        draws = torch.Tag.nondeterministic_seeded in func.tags
        unset = "empty" in func._schema.name  # what is in it has no value yet, so it is no constant
        if not draws and not unset and not any(isinstance(operand, _Of) for operand in operands):
            with without_modes():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        tensors = [value for value in pytree.tree_leaves(out) if isinstance(value, torch.Tensor)]
        results = [(tuple(value.shape), value.dtype, value.device) for value in tensors]
        kept = draws or func._schema.is_mutable or not tensors
        row = _Row(str(func), operands, results, Modes.current(), self.at(), kept)
        for number, tensor in enumerate(tensors):
            self.sources[id(tensor)] = _Of(len(self.rows), number)
        self.alive += tensors
        self.rows.append(row)
        return out

    def live(self) -> tuple[list[_Row], list[Any]]:
        """The rows that matter and the outputs, with operations counted anew."""
        wanted = {value.source for value in self.returned if isinstance(value, _Of)}
        for number in reversed(range(len(self.rows))):
            row = self.rows[number]
            if row.kept or number in wanted:
                wanted |= {number, *(value.source for value in row.operands if isinstance(value, _Of))}
        numbers = [number for number in range(len(self.rows)) if number in wanted]
        anew = {number: place for place, number in enumerate(numbers)}

        def renumbered(value: Any) -> Any:
            return _Of(anew.get(value.source, value.source), value.number) if isinstance(value, _Of) else value

        rows = [self.rows[number] for number in numbers]
        for row in rows:
            row.operands = [renumbered(value) for value in row.operands]
        return rows, [renumbered(value) for value in self.returned]


def _line() -> Any:
    """The line of the model's Python that is at work."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PASSED_BY):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def _compare(root: nn.Module, own: _Log, graph: _Log) -> None:
    """Raise at the first difference."""
    (rows, returned), (others, given) = own.live(), graph.live()
    for mine, theirs in zip_longest(rows, others):
        if mine is None or theirs is None or not _same_row(mine, theirs):
            raise _refusal(root, f"the model runs {_shown(mine)}\n    the graph runs {_shown(theirs)}")
    for number, (mine, theirs) in enumerate(zip_longest(returned, given)):
        if not _same(mine, theirs):
            raise _refusal(root, f"output {number} of the model is not the graph's")
    if own.wrote and not graph.wrote:
        raise _refusal(root, "the model changes a list, dict or set that it keeps as an attribute; the graph does not")


def _same_row(mine: _Row, theirs: _Row) -> bool:
    what = (mine.name, mine.results, mine.modes) == (theirs.name, theirs.results, theirs.modes)
    return what and len(mine.operands) == len(theirs.operands) and all(map(_same, mine.operands, theirs.operands))


def _same(mine: Any, theirs: Any) -> bool:
    if mine is theirs or type(mine) is not type(theirs):
        return mine is theirs
    if not isinstance(mine, torch.Tensor):
        return (mine == theirs and repr(mine) == repr(theirs)) or repr(mine) == repr(theirs) == "nan"
    kind = (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
    return kind and bool(((mine == theirs) | ((mine != mine) & (theirs != theirs))).all())


def _shown(row: _Row | None) -> str:
    if row is None:
        return "nothing more"
    modes = [] if row.modes.grad else ["without gradient"]
    modes += [f"under {kind} autocast to {dtype}" for kind, on, dtype in row.modes.autocast if on]
    where = f" ({row.place})"
    if isinstance(row.place, tuple):
        path, line = row.place
        where = f" at {path}:{line}: {linecache.getline(path, line).strip()}"
    results = ", ".join(f"{list(shape)} {dtype}" for shape, dtype, _ in row.results)
    return " ".join([row.name, f"-> {results}" if results else "", *modes]).strip() + where


def _refusal(root: nn.Module, difference: str) -> CaptureError:
    return CaptureError(
        f"the symbolically captured graph of {type(root).__name__} is not what its forward runs. The first "
        f"difference:\n    {difference}\nWhat Python does there is not in the graph. Remedies: Dynamo follows Python "
        "more closely (capture='dynamo' with example_inputs=); a module that does it may be taken whole with modules=, "
        "or stay outside of what is momentumized (model.backbone = mfx.momentumize(model.backbone))"
    )
