"""Outlook: what a capture of a model shows before anything is made of it; of the whole, or of the parts it allows.

1. The model is captured whole.
2. Where its Python cannot be followed into one graph, it is run on the example once, as it is; each module's calls are
   noted (:mod:`mfx.model.linked.traffic`).  From the outside inwards, modules are captured for their call, and of those
   that can be, the ones with chains count.  A module that the run did not come to is captured for the call of another
   of its class beside it.
3. A chain that goes on from one part to the next, or from a part to itself, through Python that cannot be captured, is
   linked while that runs (:mod:`mfx.model.linked`).

Known limits: where nothing is linked, a part whose forward ran more than once in the example is passed by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mfx.capture import Call, as_call
from mfx.capture.values import Otherwise
from mfx.errors import CaptureError
from mfx.find.whole.layers import layers_of
from mfx.graph.notes import GAMMA, STATE, VELOCITY
from mfx.model.generated import shallow_copy
from mfx.model.linked.deciding import Deciding
from mfx.model.linked.linkage import scopes_of
from mfx.model.linked.traffic import Traffic, traffic_within
from mfx.model.state import Entry, Momentum
from mfx.options import Options, check_patterns
from mfx.pipeline import Place
from mfx.plan import Chain
from mfx.rule.gammas import Given


@dataclass(frozen=True, eq=False)
class Outlook:
    """One captured module, momentumized, with its first graph and the call that this is for, if one is known.

    It ran ``count`` times in the example; ``scope`` is the path of the module whose Python links its chains to others.
    """

    mm: nn.Module
    entry: Entry
    call: Call | None
    count: int = 1
    scope: str | None = None

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The chains in it."""
        return self.entry.passed.plan.chains

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
        traffic = traffic_within(model, as_call(example_inputs))
    except Exception as error:
        raise refused from error  # the example is no call that can be run (shapes alone, say)
    found, alike = _parts(model, options, traffic)
    scopes = scopes_of(
        {path: (one.mm, one.entry) for path, one in found.items()}, traffic.calls, traffic.outputs, alike
    )
    found = {
        path: replace(one, scope=scopes.get(path)) for path, one in found.items() if path in scopes or one.count == 1
    }
    if not found:
        raise refused
    if scopes:
        refuse_unplanned(options, sorted(set(scopes.values())))
    _check_patterns(found, options)
    return found


def refuse_unplanned(options: Options, scopes: list[str]) -> None:
    """Raise for what needs to be known before a call whose Python decides where chains begin and end."""
    if options.velocity != "zero":
        raise CaptureError(
            f"the Python of {_shown(scopes)} decides in each call which blocks follow one another, so where a chain "
            f"begins is not known beforehand, and velocity={options.velocity!r} cannot be planned: use velocity='zero'"
        )
    if options.rule is not None or options.readout != "x":
        raise CaptureError(
            f"the Python of {_shown(scopes)} decides in each call which blocks follow one another; chains that it "
            "joins run by momentum alone (gamma=) and hand out x: leave rule= and readout= out"
        )
    if options.activation_budget is not None:
        raise CaptureError(
            f"the Python of {_shown(scopes)} decides in each call which blocks run, so what a step keeps is not known "
            "beforehand: leave activation_budget= out"
        )


def _shown(scopes: list[str]) -> str:
    return ", ".join(scope or "the model's forward" for scope in scopes)


def _whole(model: nn.Module, options: Options, example_inputs: Any) -> Outlook:
    momentum = Momentum(type(model), replace(options, shapes=example_inputs is not None))
    mm = shallow_copy(model, momentum)
    entry = momentum.first(mm, example_inputs)
    for name, factory in ((VELOCITY, options.velocity), (GAMMA, options.gamma)):
        if callable(factory):
            chains = {str(chain.index): factory(chain) for chain in entry.passed.plan.chains}
            mm.add_module(name, nn.ModuleDict(chains).train(model.training))
        if isinstance(factory, Given):
            factory.check()
    return Outlook(mm, entry, None if example_inputs is None else as_call(example_inputs))


def _parts(model: nn.Module, options: Options, traffic: Traffic) -> tuple[dict[str, Outlook], dict[str, str]]:
    """The outermost modules that can be captured and have chains; and of those not called, which stands for them."""
    found: dict[str, Outlook] = {}
    alike: dict[str, str] = {}

    def taken(module: nn.Module, path: str, calls: Sequence[Call]) -> bool:
        """Whether the module can be captured; if it has chains it is found."""
        count = sum(len(outlook.entry.passed.plan.chains) for outlook in found.values())
        outlook = _part(module, path, count, options, calls) if calls else None
        if outlook is not None and outlook.entry.passed.plan.chains:
            found[path] = outlook
        return outlook is not None

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            if not taken(child, here, traffic.calls.get(here, ())):
                visit(child, here)
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            beside = (other for other in found if other.rpartition(".")[0] == path)
            other = next((one for one in beside if type(model.get_submodule(one)) is type(child)), None)
            calls = () if other is None or traffic.calls.get(here) else traffic.calls[other][:1]
            if taken(child, here, calls) and here in found and other is not None:
                alike[here], found[here] = other, replace(found[here], count=0)

    visit(model, "")
    return found, alike


def _part(module: nn.Module, path: str, first: int, options: Options, calls: Sequence[Call]) -> Outlook | None:
    """The part, if it can be captured; if its Python asks whether values are finite, as it is where they are."""
    for kind in (Momentum, Deciding):
        momentum = kind(type(module), replace(options, shapes=True, checked=True), Place(path, first=first))
        mm = shallow_copy(module, momentum)
        try:
            outlook = Outlook(mm, momentum.entry(mm, calls[0]), calls[0], count=len(calls))
        except (CaptureError, Otherwise):
            continue
        # A question about a state inside of a chain would keep that: the parts around it are better linked.
        if kind is Momentum or not any(chain.taps for chain in outlook.chains):
            return outlook
    return None


def _check_patterns(found: dict[str, Outlook], options: Options) -> None:
    """Refuse patterns that match no block of any part."""
    names = [name for outlook in found.values() for name in outlook.entry.passed.plan.places]
    for argument in ("include", "exclude"):
        check_patterns(argument, getattr(options, argument), names)
    if isinstance(options.gamma, tuple):
        check_patterns("gamma", (pattern for pattern, _ in options.gamma), names)
