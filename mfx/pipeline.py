"""Pipeline: the one way through the house, for every door.

    capture -> find -> plan (-> budget) -> rewrite

Each step takes a value and gives one.  A door (symbolic or Dynamo capture, a model inside ``torch.compile``, a backend
of it) brings a graph with its notes and the form that it is in (:mod:`mfx.rewrite.binding`); the rest is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from mfx.budget import within, without_budget
from mfx.capture import named_modules
from mfx.errors import OptionError, PlanChangedError
from mfx.find import Found, find
from mfx.find.streams import rounds_of, with_streams
from mfx.find.whole.layers import with_layers
from mfx.find.whole.named import own_add
from mfx.options import Options
from mfx.plan import Plan, plan, with_options
from mfx.rewrite import Binding, ByRoot, Rewritten, rewrite, with_rules


@dataclass(frozen=True)
class Place:
    """Where a graph's module stands in the model that blocks and chains are named in.

    ``prefix`` is its path, ``numbers`` are those of its chains there, by the name of the first block; chains that have
    none count on from ``first``.
    """

    prefix: str = ""
    numbers: Mapping[str, int] = field(default_factory=dict)
    first: int = 0


WHOLE = Place()
"""The model itself."""
BY_ROOT = ByRoot()
NOTHING: Mapping[str, tuple[str, ...]] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Passed:
    """A graph that went through the pass: what was found, what was planned, what came out."""

    found: Found
    plan: Plan
    rewritten: Rewritten

    def with_options(self, options: Options) -> Passed:
        """The same with the gammas of ``options``; without what a budget chose, if that was for gamma = 0 or is now."""
        planned = with_options(self.plan, options)
        if any(chain.plain != chain.at_0 for chain in planned.chains) and planned.forecast is not None:
            planned = without_budget(planned)
            return replace(self, plan=planned, rewritten=rewrite(self.found, planned, ByRoot()))
        return replace(self, plan=planned, rewritten=with_rules(self.rewritten, planned))

    def within(self, root: nn.Module, inputs: Sequence[Any], binding: Binding = BY_ROOT) -> Passed:
        """The same within the budget of its options, for some inputs; ``binding`` is the one that it has."""
        budget = self.plan.options.activation_budget
        assert budget is not None
        planned = within(self.found, self.plan, binding.measured(), root, inputs, budget)
        return replace(self, plan=planned, rewritten=rewrite(self.found, planned, binding))


def momentumize_graph(
    graph: fx.Graph,
    holder: nn.Module,
    options: Options,
    binding: Binding,
    model: nn.Module | None = None,
    place: Place = WHOLE,
    before: Mapping[str, tuple[str, ...]] = NOTHING,
) -> Passed:
    """find -> plan -> rewrite for a graph with notes, which is left as it is.

    Args:
        graph: the graph.
        holder: the module that its names are relative to.
        options: what to rewrite.
        binding: the form that the graph is in.
        model: where it is not ``holder``, the module that was captured.
        place: where that stands in the model that the options are about.
        before: the places of an earlier plan (:attr:`mfx.plan.Plan.places`), which this one takes over as it can.

    Raises:
        OptionError: an option names what is not there, or a layer that cannot be rewritten.
    """
    found = find(graph, holder, kind=options.kind, only_whole=options.only_whole, prefix=place.prefix)
    apart = options.only_whole or options.learned  # what is learned is that of one stream
    streams = [] if apart else rounds_of(found.flow, found.blocks)
    graph_of_streams = with_streams(found.flow, streams) if streams else None
    if graph_of_streams is not None:
        found = find(graph_of_streams, holder, kind=options.kind, prefix=place.prefix)
    found = with_layers(found, options.layers, place.prefix) if options.layers else found
    planned = plan(found, options, place.numbers, place.first, before)
    _require_named(holder if model is None else model, found, planned)
    return Passed(found, planned, rewrite(found, planned, binding))


def _require_named(model: nn.Module, found: Found, planned: Plan) -> None:
    """Where nothing but the named modules was to be rewritten, each of them must be."""
    if not planned.options.only_whole:
        return
    kept = {row.name.partition("#")[0]: row.text for row in planned.rejections}
    rewritten = {name.partition("#")[0] for chain in planned.names for name in chain}
    named = sorted(named_modules(model, planned.options).values())
    for path in named:
        if any(path.startswith(f"{outer}.") for outer in named):
            continue
        if path not in rewritten or path in kept:
            why = kept.get(path, f"{type(model).__name__}.forward does not call it, or not for a tensor")
            raise OptionError(
                f"{path} of {type(model).__name__} cannot become a momentum step: {why}. Leave it out of the layers"
            )
    if planned.options.kind == "wrapped":
        own = next((block for block in found.blocks if own_add(found.flow, block.skip, block.value) is not None), None)
        if own is not None:
            raise OptionError(
                f"{type(model).__name__}.forward itself adds x to the value of {own.name}, so it is a branch and not a "
                "whole block: pass is_residual=True"
            )


def refuse_other_places(before: Mapping[str, tuple[str, ...]], now: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse a capture in which a residual add (by name) is in another chain than in the first, or in none.

    Raises:
        PlanChangedError: the model would compute another function.
    """
    for name in sorted(before, key=lambda name: bool(now.get(name))):
        first, here = before[name], now.get(name)
        if first != here and (first or here):
            raise PlanChangedError(
                f"captured for this call or mode, block {name!r} is {_place(here)}; at first it was "
                f"{_place(first)}. The model would compute another function: exclude these blocks, or "
                "momentumize it in the mode and with the arguments you use (and without checkpointing that hides "
                "its blocks)"
            )


def _place(chain: tuple[str, ...] | None) -> str:
    if chain is None:
        return "not there"
    return f"in the chain {list(chain)}" if chain else "kept as it is"
