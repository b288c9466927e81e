"""Outlook: what a capture of a model shows before anything is made of it; of the whole, or of the parts it allows.

1. The model is captured whole.
2. Where its Python cannot be followed into one graph, it is run on the example once, as it is; each module's call is
   noted.  From the outside inwards, modules are captured for their call, and of those that can be, the ones with chains
   count.

3. A chain that would go on from one part to the next, were it not for the Python between, is refused: each part starts
   with a new velocity, so the model would be another function.

Known limits: a part whose forward ran more than once in the example is passed by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mfx.capture import Call, as_call
from mfx.errors import CaptureError
from mfx.find.whole.layers import layers_of
from mfx.graph.notes import GAMMA, STATE, VELOCITY
from mfx.model.generated import shallow_copy
from mfx.model.owners import untouched
from mfx.model.state import Entry, Momentum
from mfx.options import Options, check_patterns
from mfx.pipeline import Place
from mfx.rule.gammas import Given
from mfx.torch_versions import pytree


@dataclass(frozen=True, eq=False)
class Outlook:
    """One captured module, momentumized, with its first graph and the call that this is for, if one is known."""

    mm: nn.Module
    entry: Entry
    call: Call | None

    @property
    def momentum(self) -> Momentum:
        """Its momentum side."""
        return self.mm.__dict__[STATE]


def outlooks(model: nn.Module, options: Options, example_inputs: Any) -> dict[str, Outlook]:
    """What can be captured of ``model``, by path; "" alone where that is all of it.

    Raises:
        CaptureError: nothing with a residual block can be followed.
    """
    options = replace(options, layers=layers_of(model)) if options.granularity == "layer" else options
    try:
        return {"": _whole(model, options, example_inputs)}
    except CaptureError as error:
        if example_inputs is None or options.learned:
            raise
        refused = error
    try:
        traffic = _traffic_within(model, as_call(example_inputs))
    except Exception as error:
        raise refused from error  # the example is no call that can be run (shapes alone, say)
    found = _parts(model, options, traffic)
    if not found or _are_linked(found, traffic):
        raise refused
    _check_patterns(found, options)
    return found


def _whole(model: nn.Module, options: Options, example_inputs: Any) -> Outlook:
    momentum = Momentum(type(model), replace(options, shapes=example_inputs is not None))
    mm = shallow_copy(model, momentum)
    entry = momentum.first(mm, example_inputs)
    for name, factory in ((VELOCITY, options.velocity), (GAMMA, options.gamma)):
        if callable(factory):
            chains = {str(chain.index): factory(chain) for chain in entry.passed.plan.chains}
            mm.add_module(name, nn.ModuleDict(chains))
        if isinstance(factory, Given):
            factory.check()
    return Outlook(mm, entry, None if example_inputs is None else as_call(example_inputs))


@dataclass(frozen=True, eq=False)
class _Traffic:
    """What went into and came out of each module in one run of a model."""

    calls: Mapping[str, list[Call]]
    outputs: Mapping[str, list[Any]]


def _are_linked(found: Mapping[str, Outlook], traffic: _Traffic) -> bool:
    """Whether a chain that ends with one part would go on with another."""
    ends = [
        leaf
        for path, outlook in found.items()
        if any(user.op == "output" for chain in outlook.entry.passed.plan.chains for user in chain.output.users)
        for leaf in pytree.tree_leaves(traffic.outputs[path])
    ]
    starts = [
        tensor
        for path, outlook in found.items()
        if any(chain.input.op == "placeholder" for chain in outlook.entry.passed.plan.chains)
        for tensor in traffic.calls[path][0].tensors
    ]
    return any(end is start for end in ends for start in starts)


def _parts(model: nn.Module, options: Options, traffic: _Traffic) -> dict[str, Outlook]:
    """The outermost modules that can be captured and have chains."""
    calls = traffic.calls
    found: dict[str, Outlook] = {}

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            if len(calls.get(here, ())) == 1:
                count = sum(len(outlook.entry.passed.plan.chains) for outlook in found.values())
                outlook = _part(child, here, count, options, calls[here][0])
                if outlook is not None:
                    if outlook.entry.passed.plan.chains:
                        found[here] = outlook
                    continue
            visit(child, here)

    visit(model, "")
    return found


def _part(module: nn.Module, path: str, first: int, options: Options, call: Call) -> Outlook | None:
    momentum = Momentum(type(module), replace(options, shapes=True, checked=True), Place(path, first=first))
    mm = shallow_copy(module, momentum)
    try:
        return Outlook(mm, momentum.entry(mm, call), call)
    except CaptureError:
        return None


def _traffic_within(model: nn.Module, call: Call) -> _Traffic:
    """The calls of each module, and what they gave, in one run of the model as it is."""
    calls: dict[str, list[Call]] = {}
    outputs: dict[str, list[Any]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched(model))
        for path, module in model.named_modules():
            stack.enter_context(_noting(module, calls.setdefault(path, []), outputs.setdefault(path, [])))
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    return _Traffic(calls, outputs)


@contextlib.contextmanager
def _noting(module: nn.Module, calls: list[Call], outputs: list[Any]) -> Iterator[None]:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(Call(args, kwargs))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_patterns(found: dict[str, Outlook], options: Options) -> None:
    """Refuse patterns that match no block of any part."""
    names = [name for outlook in found.values() for name in outlook.entry.passed.plan.places]
    for argument in ("include", "exclude"):
        check_patterns(argument, getattr(options, argument), names)
    if isinstance(options.gamma, tuple):
        check_patterns("gamma", (pattern for pattern, _ in options.gamma), names)
