"""The momentumized model, and :func:`momentumize`.

A momentumized model is a shallow copy of the model whose class is a generated subclass with one method
replaced, ``forward`` (M4): parameters, buffers and modules stay where they are and are shared with the
original; state_dict keys, attributes, ``isinstance``, ``.to()``, ``deepcopy``, pickling are the model's own.

Each call looks up the rewritten graph for its form (which arguments are given, tensors aside) and for the
training flags and settings of the modules (:class:`mfx.capture.Guards`, or Dynamo's), and captures the model anew
where there is none.  Every graph must give the chains of the first one: the function must not depend on the mode.

Known limits: forward hooks on modules that the capture entered do not run (a warning names them).
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from mfx.capture import ADDED, Capture, Signature, as_call, default_signature
from mfx.compiling import new_token, traced
from mfx.dynamo import DynamoCapture
from mfx.errors import (
    CaptureError,
    HookWarning,
    InputTypeError,
    MfxError,
    NothingRewrittenWarning,
    OptionError,
    PlanChangedError,
)
from mfx.momentum import ChainSpec
from mfx.options import Gamma, Options, Patterns, Velocity, check_gamma, make_options
from mfx.parts import refuse_replica
from mfx.pipeline import Entry, prepare, prepare_dynamo
from mfx.rewrite import with_gammas
from mfx.whole import STATE

Model = TypeVar("Model", bound=nn.Module)
_MOST_GRAPHS = 32


class Momentum:
    """What makes a model a momentumized one: its options, and its graphs so far."""

    def __init__(self, original: type[nn.Module], options: Options) -> None:
        self.original = original
        self.options = options
        self.chains: tuple[tuple[str, ...], ...] | None = None
        self.places: dict[str, tuple[str, ...]] = {}
        self.entries: dict[Any, list[Entry]] = {}
        self.hooked: set[str] = set()
        self.token = new_token()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entries": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, token=new_token())

    def __deepcopy__(self, memo: dict[int, Any]) -> Momentum:
        twin = Momentum(self.original, self.options)
        twin.chains, twin.places = self.chains, self.places
        return twin

    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that are rewritten."""
        return tuple(name for chain in self.chains or () for name in chain)

    def specs(self) -> tuple[ChainSpec, ...]:
        """The chains of all captures so far."""
        return tuple(chain for found in self.entries.values() for entry in found for chain in entry.rewritten.chains)

    def latest(self) -> tuple[ChainSpec, ...]:
        """The chains of the latest capture."""
        return self.latest_entry().rewritten.chains

    def latest_entry(self) -> Entry:
        """The latest capture."""
        entries = [entry for found in self.entries.values() for entry in found]
        if not entries:
            raise MfxError("the model has no captured graph yet: run it once")
        return entries[-1]

    def set_gamma(self, gamma: Gamma) -> None:
        """Run with another gamma from the next forward on."""
        options = replace(self.options, gamma=check_gamma(gamma))
        self.options, self.token = options, new_token()
        for entries in self.entries.values():
            for index, entry in enumerate(entries):
                chains = tuple(chain.with_gammas(options) for chain in entry.plan.chains)
                planned = replace(entry.plan, chains=chains, options=options)
                entries[index] = replace(entry, plan=planned, rewritten=with_gammas(entry.rewritten, planned))

    def expected(self, root: nn.Module) -> tuple[tuple[str, ...], ...] | None:
        """The names of each chain's blocks, once the model has been captured."""
        return self.chains

    def velocities(self, root: nn.Module) -> list[nn.Module]:
        """The modules of the learned velocities, one for each chain."""
        return list(getattr(root, ADDED).values()) if hasattr(root, ADDED) else []

    def call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the rewritten model."""
        refuse_replica(root)
        entry = self.entry(root, args, kwargs)
        self.warn_of_hooks(entry, stacklevel=2)
        return entry.run(root, args, kwargs)

    def warn_of_hooks(self, entry: Entry, stacklevel: int) -> None:
        """Tell, once for each module, that its hooks do not run."""
        hooked = [path for path in entry.capture.hooked if path not in self.hooked]
        if hooked:
            self.hooked.update(hooked)
            warnings.warn(
                f"forward or backward hooks on {', '.join(hooked)} will not run: their modules are part of the "
                f"captured graph of {self.original.__name__}. Hooks on the model itself and on modules taken whole "
                "do run",
                HookWarning,
                stacklevel=stacklevel + 1,
            )

    def entry(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The graph for calls of this form, in the modes the modules are in."""

        def by_fx() -> Entry:
            signature, tensors = Signature.of(args, kwargs)
            return self._of_fx(root, signature, tensors if self.options.shapes else None)

        return self._by(by_fx, lambda: self._of_dynamo(root, args, kwargs))

    def first(self, root: nn.Module, example_inputs: Any) -> Entry:
        """The graph of the example's call; without one, of the call that forward's signature suggests."""
        if example_inputs is not None:
            return self.entry(root, *as_call(example_inputs))

        def by_dynamo() -> Entry:
            raise CaptureError("Dynamo captures a call: pass example_inputs= as the model's forward takes them")

        return self._by(lambda: self._of_fx(root, default_signature(self.original.forward), None), by_dynamo)

    def _by(self, by_fx: Callable[[], Entry], by_dynamo: Callable[[], Entry]) -> Entry:
        """By the capture that is asked for; where that is left open, by Dynamo as soon as fx has failed."""
        if self.options.capture == "dynamo":
            return by_dynamo()
        try:
            return by_fx()
        except CaptureError as error:
            if self.options.capture != "auto":
                raise
            refused = error
        try:
            entry = by_dynamo()
        except CaptureError as error:
            raise CaptureError(f"{refused}\nThe other way, Dynamo: {error}") from refused
        self.options = replace(self.options, capture="dynamo")
        return entry

    def _of_fx(self, root: nn.Module, signature: Signature, tensors: list[torch.Tensor] | None) -> Entry:
        known = self.entries.setdefault((signature.key, torch.is_grad_enabled()), [])
        for entry in known:
            if isinstance(entry.capture, Capture) and entry.capture.guards.hold(root):
                return entry
        return self._add(known, prepare(root, self.original.forward, signature, self.options, tensors))

    def _of_dynamo(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        known = self.entries.setdefault("dynamo", [])
        for entry in reversed(known):
            if isinstance(entry.capture, DynamoCapture) and entry.capture.holds(root, args, kwargs):
                return entry
        return self._add(known, prepare_dynamo(root, self.original.forward, self.options, args, kwargs))

    def _add(self, known: list[Entry], entry: Entry) -> Entry:
        self._same_chains(entry)
        if len(known) >= _MOST_GRAPHS:
            known.pop(0)
        known.append(entry)
        return entry

    def _same_chains(self, entry: Entry) -> None:
        """A model must compute one function: chains that differ from the first capture's are an error."""
        places = entry.plan.places
        if self.chains is None:
            self.chains, self.places = entry.plan.names, places
            return
        for name, chain in places.items():
            before = self.places.get(name, chain)
            if before != chain:
                raise PlanChangedError(
                    f"captured for this call or mode, block {name!r} is {_place(chain)}; at first it was "
                    f"{_place(before)}. The model would compute another function: exclude these blocks, or "
                    "momentumize it in the mode and with the arguments you use"
                )


def _place(chain: tuple[str, ...]) -> str:
    return f"in the chain {list(chain)}" if chain else "kept as it is"


def momentumize(
    model: Model,
    gamma: Gamma = 0.9,
    *,
    example_inputs: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    modules: Patterns = None,
    velocity: Velocity = "zero",
    reversible: bool = True,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
    capture: str = "auto",
) -> Model:
    """The same model with its chains of residual blocks as reversible momentum chains.

    Each block ``x <- x + f(x)`` becomes::

        v <- gamma * v + (1 - gamma) * f(x)
        x <- x + v

    run backwards in closed form during backward, so that no activation of the chain is stored.  ``gamma = 0`` is
    the original model's function.

    Args:
        model: any module that gives one graph; it is left as it is, and shares its parameters, buffers and submodules
            with the result (``copy.deepcopy`` it first for independent ones).
        gamma: float in [0, 1), or a mapping from block-name pattern to float (first match wins; a block that
            none matches is kept).
        example_inputs: tensor, tuple or dict, as the model's forward takes them.  Makes shapes known when
            planning, and tells how a forward with ``*args`` is called; Dynamo needs them.
        include: ``fnmatch`` pattern or patterns; only blocks whose name matches one are rewritten.
        exclude: pattern or patterns of blocks to keep.
        modules: patterns over module paths; each matching module is taken whole as one block,
            ``F(x) = module(x) - x``.
        velocity: v_0 of each chain: ``"zero"``; ``"first"``, v_0 = F_0(x_0); or a factory
            ``velocity(chain) -> nn.Module`` whose module maps x_0 to v_0 and is registered as
            ``momentum_velocity.<chain index>``.
        reversible: False runs the same recurrence with stored activations.
        state_dtype: dtype of the carried state (x, v), at least the compute dtype; ``"auto"`` leaves the choice
            between that and one precision up to the plan (:mod:`mfx.precision`), which takes the cheaper in bytes.
        tolerance: relative error that reversing may make; decides arithmetic and distance of snapshots.  None is
            1e-10 for float64, 1e-4 for float32, 1e-2 for bfloat16 and float16, also as autocast has them.
        capture: ``"fx"`` (symbolic tracing), ``"dynamo"``, or ``"auto"``: fx first, Dynamo where the model's Python
            depends on values that symbolic tracing does not have.

    Returns:
        A new model of a subclass of the model's class.

    Raises:
        OptionError: an argument has a value that cannot be used.
        InputTypeError: ``model`` is not a module, or an argument is of another wrong type.
        CaptureError: the model's Python cannot be followed; names the module and the line.

    Example:
        >>> import torch, torchvision, mfx
        >>> model = torchvision.models.resnet18(weights=None)
        >>> mm = mfx.momentumize(model, gamma=0.9)
        >>> mm(torch.randn(2, 3, 64, 64)).sum().backward()
        >>> model.layer1[0].conv1.weight.grad is not None
        True

    Source: Sander et al., "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
    """
    options = make_options(
        gamma,
        include=include,
        exclude=exclude,
        modules=modules,
        velocity=velocity,
        reversible=reversible,
        state_dtype=state_dtype,
        tolerance=tolerance,
        capture=capture,
    )
    check_model(model)
    momentum = Momentum(type(model), replace(options, shapes=example_inputs is not None))
    mm = _shallow_copy(model, momentum)
    entry = momentum.first(mm, example_inputs)
    momentum.warn_of_hooks(entry, stacklevel=2)
    _warn_if_nothing(entry, type(model).__name__)
    if callable(options.velocity):
        chains = {str(chain.index): options.velocity(chain) for chain in entry.plan.chains}
        mm.add_module(ADDED, nn.ModuleDict(chains))
    return mm


def momentum_version(model: Model, options: Options) -> Model:
    """The momentumized model for ``options``; one that needs Dynamo is captured by its first call."""
    check_model(model)
    momentum = Momentum(type(model), options)
    mm = _shallow_copy(model, momentum)
    try:
        momentum.warn_of_hooks(momentum.first(mm, None), stacklevel=4)
    except CaptureError:
        if options.capture == "fx":
            raise
    return mm


def check_model(model: Any) -> None:
    """Refuse what is not a plain module."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if STATE in model.__dict__:
        raise OptionError("model is momentumized already: give the original, or use mfx.set_gamma to change gamma")
    if "forward" in model.__dict__:
        raise InputTypeError(
            f"{type(model).__name__} has a forward of its own on the instance (model.forward = ...), which a "
            "captured graph would pass by: delete it, or put it into a class"
        )


def momentum_of(mm: nn.Module) -> Momentum:
    """The momentumized side of a model."""
    momentum = mm.__dict__.get(STATE)
    if not isinstance(momentum, Momentum):
        raise InputTypeError(f"{type(mm).__name__} is not a momentumized model: call mfx.momentumize on it first")
    return momentum


def graph_of(mm: nn.Module) -> fx.Graph:
    """The rewritten graph of a momentumized model's latest capture, for printing.

    Example:
        >>> import torchvision, mfx
        >>> mm = mfx.momentumize(torchvision.models.resnet18(weights=None), gamma=0.9)
        >>> [n.name for n in mfx.graph_of(mm).nodes if n.name.startswith("momentum")][:1]
        ['momentum_0']
    """
    return momentum_of(mm).latest_entry().rewritten.graph


def _warn_if_nothing(entry: Entry, name: str) -> None:
    if not entry.plan.chains:
        reasons = {row.text for row in entry.plan.rejections}
        why = f" ({'; '.join(sorted(reasons)[:3])})" if reasons else " (it has no residual add)"
        warnings.warn(
            f"nothing was rewritten in {name}{why}: the model comes back equivalent",
            NothingRewrittenWarning,
            stacklevel=3,
        )


def _shallow_copy(model: Model, momentum: Momentum) -> Model:
    """The model with its own tables of children, parameters and buffers, and the generated class."""
    mm = copy.copy(model)
    mm.__class__ = _momentum_class(type(model))
    state = dict(model.__dict__)
    for table, entries in state.items():
        if table.startswith("_") and isinstance(entries, (dict, set)):
            state[table] = copy.copy(entries)
    mm.__dict__ = {**state, STATE: momentum}
    return mm


@functools.cache
def _momentum_class(original: type[nn.Module]) -> type[Any]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return traced(self, getattr(self, STATE), original.forward, args, kwargs)
        return self.__dict__[STATE].call(self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state = dict(self.__dict__)
        return _rebuild, (original,), state

    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), namespace)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """An empty momentumized model, for unpickling."""
    created = _momentum_class(original)
    return nn.Module.__new__(created)
