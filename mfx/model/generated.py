"""Generated classes: a momentumized model is a shallow copy of the model, of a subclass with one method replaced.

Parameters, buffers and modules stay where they are and are shared with the original; state_dict keys, attributes,
``isinstance``, ``.to()``, ``deepcopy``, pickling are the model's own (M4).
"""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

import torch
from torch import fx, nn

from mfx.capture.dynamo import capturing
from mfx.capture.tracer import is_followed
from mfx.compile.inside import traced, traced_within
from mfx.errors import EntryError, InputTypeError, PlanChangedError
from mfx.graph.notes import STATE
from mfx.model.saved import described, saving_methods
from mfx.model.state import Momentum
from mfx.torch_versions import fsdp_shared, fsdp_state

Model = TypeVar("Model", bound=nn.Module)

_COMPILED = "_compiled_call_impl"
"""Where ``module.compile()`` keeps what it made; torch itself leaves it out of copies."""


def copied(model: Model) -> Model:
    """The model with its own tables of children, parameters, buffers and hooks; what they hold is shared.

    Hooks of ``fully_shard`` exchange the parameters in the model's table, so one that is sharded is shared itself.
    """
    # Not by copy.copy: fully_shard's classes construct a new model in their __new__, those of torch's parametrizations
    # (weight_norm) refuse to give their state.
    mm = nn.Module.__new__(type(model))
    state = dict(model.__dict__)
    state.pop(_COMPILED, None)  # compiled in place, it would run the model that it was made from
    for table, entries in state.items():
        if table.startswith("_") and isinstance(entries, (dict, set)):
            state[table] = copy.copy(entries)
    if fsdp_state(model) is not None:
        state["_parameters"] = model._parameters
    mm.__dict__ = state
    fsdp_shared(model, mm)
    return mm


def shallow_copy(model: Model, momentum: Momentum) -> Model:
    """The same, of the generated class and with its momentum side."""
    mm = copied(model)
    mm.__class__ = _momentum_class(type(model), momentum.method, momentum.guarded)
    mm.__dict__[STATE] = momentum
    momentum.holders.add(mm)
    return mm


def guarded(mm: Model, methods: tuple[str, ...]) -> Model:
    """``mm``, whose ``methods`` from now on raise where they are called alone."""
    momentum: Momentum = mm.__dict__[STATE]
    momentum.guarded = methods
    mm.__class__ = _momentum_class(momentum.original, momentum.method, methods)
    return mm


@functools.cache
def _momentum_class(original: type[nn.Module], method: str, guarded: tuple[str, ...]) -> type[Any]:
    """The subclass whose ``method`` runs the captured graph.

    ``guarded`` methods run in a part of that graph, and would be the plain network if they were called alone.
    """
    function = getattr(original, method)

    @functools.wraps(function)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return traced(self, getattr(self, STATE), function, args, kwargs)
        if STATE not in self.__dict__:
            raise InputTypeError(
                f"this {original.__name__} was made from the class of a momentumized one (a slice of it, "
                "type(mm)(...)) and has no momentum side: momentumize it, or use the class of the original"
            )
        return self.__dict__[STATE].call(self, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state = dict(self.__dict__)
        state.pop(_COMPILED, None)
        return _rebuild, (original, method, guarded), state

    def extra_repr(self: nn.Module) -> str:
        return "\n".join(filter(None, (original.extra_repr(self), *described(self.__dict__.get(STATE)))))

    def restore(self: nn.Module, state: Any) -> None:
        original.__setstate__(self, state)
        if STATE in self.__dict__:
            self.__dict__[STATE].holders.add(self)

    namespace = {
        **(_OF_A_GRAPH if issubclass(original, fx.GraphModule) else saving_methods(original)),
        "__prepare_scriptable__": _refuse_script,
        "extra_repr": extra_repr,
        **{name: _guard(original, name) for name in guarded},
        method: run,
        "__reduce_ex__": reduce,
        "__setstate__": restore,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), namespace)


def _deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy that is momentumized, too; a GraphModule's own would be one of the graph, the plain network."""
    twin = memo[id(self)] = nn.Module.__new__(type(self))
    twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
    twin.__dict__[STATE].holders.add(twin)
    return twin


def _copy(self: nn.Module) -> nn.Module:
    """The same for ``copy.copy``."""
    twin = nn.Module.__new__(type(self))
    twin.__dict__.update(self.__dict__)
    twin.__dict__[STATE].holders.add(twin)
    return twin


def _refuse_graph(self: nn.Module) -> Any:
    """What a GraphModule calls when it gets another graph."""
    raise PlanChangedError(
        f"this {type(self).__name__} is momentumized, and got another graph: momentumize the original with that graph. "
        "A feature extractor of torchvision has one for each mode: momentumize it in the mode that it will be used in"
    )


_OF_A_GRAPH = {"__deepcopy__": _deep_copy, "__copy__": _copy, "recompile": _refuse_graph}
"""Methods of a momentumized fx.GraphModule, whose own would make the plain network of its graph."""


def _refuse_script(self: nn.Module) -> Any:
    """What torch.jit.script calls before anything else."""
    raise EntryError(
        f"{type(self).__name__} is momentumized and cannot be scripted: TorchScript would compile the source of the "
        "plain network. torch.jit.trace and torch.compile take it"
    )


def _guard(original: type[nn.Module], name: str) -> Any:
    """A method that may be followed by a capture, and not be called."""
    function = getattr(original, name)

    @functools.wraps(function)
    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if not capturing.on:
                traced_within(self, refusal)
        else:
            refusal.check(self)
        return function(self, *args, **kwargs)

    refusal = _Refusal(original, name)
    return guarded


class _Refusal:
    """Refuses a method that runs a part of what is captured, where nothing follows it."""

    owners = ()

    def __init__(self, original: type[nn.Module], name: str) -> None:
        self.original, self.name = original, name

    def check(self, module: nn.Module) -> None:
        """Raise, unless a capture follows the method."""
        if is_followed():
            return
        original, name = self.original, self.name
        raise EntryError(
            f"{original.__name__}.{name} runs blocks of a momentum chain that {original.__name__}.forward runs whole; "
            "called alone it would be the plain network. Call the model, or the original's method for the plain one"
        )


def _rebuild(original: type[nn.Module], method: str, guarded: tuple[str, ...]) -> nn.Module:
    """An empty momentumized model, for unpickling."""
    created = _momentum_class(original, method, guarded)
    return nn.Module.__new__(created)
