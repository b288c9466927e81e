"""Conversion: from a model to its momentumized version."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from mfx.capture import Call, as_call
from mfx.errors import CaptureError, InputTypeError, NothingRewrittenWarning, OptionError
from mfx.graph.notes import STATE
from mfx.model.generated import guarded, shallow_copy
from mfx.model.inner import guard_below
from mfx.model.linked.building import Part, linked_model
from mfx.model.outlook import Outlook, outlooks, refuse_unplanned
from mfx.model.owners import guarded_methods, side_of, with_shells
from mfx.model.parts import parts_of
from mfx.model.saved import EXAMPLE, form_of, saving_methods
from mfx.model.state import Momentum
from mfx.options import Budget, Gamma, Options, Patterns, RuleName, Velocity, make_options
from mfx.sharding import refuse_wrapped

Model = TypeVar("Model", bound=nn.Module)
_NO_OPTIONS = ("model", "example_inputs")


def momentumize(
    model: Model,
    gamma: Gamma = 0.9,
    *,
    example_inputs: Any = None,
    rule: RuleName = "momentum",
    h: float | None = None,
    readout: str = "x",
    granularity: str = "add",
    include: Patterns = None,
    exclude: Patterns = None,
    modules: Patterns = None,
    velocity: Velocity = "zero",
    reversible: bool = True,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
    capture: str = "auto",
    activation_budget: Budget = None,
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
        gamma: float in [-1, 1), or a mapping from block-name pattern to float (first match wins; a block that
            none matches is kept).  Below 0 are the damped relatives of the midpoint rule.  A tensor: of one value, one
            a block (in the order of the report), or one that broadcasts against x, for one a sample.  A factory
            ``gamma(chain) -> nn.Module``, such as :class:`mfx.LearnedGamma` or :class:`mfx.RandomSign`, whose module
            maps x_0 to such a tensor with one entry a block, or to None (the plain network), and is registered as
            ``momentum_gamma.<chain index>``.  Gradients reach tensors and modules.
        example_inputs: tensor, tuple or dict, as the model's forward takes them.  Makes shapes known when
            planning, and tells how a forward with ``*args`` is called; Dynamo needs them.
        rule: ``"momentum"``, by ``gamma``; ``"midpoint"``, ``x_{k+1} = x_{k-1} + 2 f(x_k)``, which is gamma = -1;
            ``"leapfrog"``, ``x_{k+1} = 2 x_k - x_{k-1} + h^2 f(x_k)``; or an object of a class of one's own that
            derives from :class:`mfx.Rule`.
        h: the step of the leapfrog rule; None is 1.
        readout: what a chain hands out, at its end and at states that are read on the way: ``"x"``, or ``"z"``,
            ``z = x + gamma / (1 - gamma) v``, where x would come to rest: z is the original network, each branch of
            which reads an x that lags by gamma / (1 - gamma) blocks.  Blocks themselves always read x.
        granularity: ``"add"``: each residual add is a block; ``"layer"``: the adds of one layer (attention and MLP)
            are one block, ``F(x) = layer(x) - x``.
        include: ``fnmatch`` pattern or patterns; only blocks whose name matches one are rewritten.
        exclude: pattern or patterns of blocks to keep.
        modules: patterns over module paths; each matching module is taken whole as one block,
            ``F(x) = module(x) - x``.
        velocity: v_0 of each chain: ``"zero"``; ``"first"``, by which v_1 = F_0(x_0); or a factory
            ``velocity(chain) -> nn.Module`` whose module maps x_0 to v_0 and is registered as
            ``momentum_velocity.<chain index>``.
        reversible: False runs the same recurrence with stored activations.
        state_dtype: dtype of the carried state (x, v), at least the compute dtype; ``"auto"`` leaves the choice
            between that and one precision up to the plan (:mod:`mfx.rule.arithmetic.snapshots`), which takes the
            cheaper in bytes.
        tolerance: relative error that reversing may make; decides arithmetic and distance of snapshots.  None is
            1e-10 for float64, 1e-4 for float32, 1e-2 for bfloat16 and float16, also as autocast has them.
        capture: ``"fx"`` (symbolic tracing), ``"dynamo"``, or ``"auto"``: fx first, Dynamo where the model's Python
            depends on values that symbolic tracing does not have.
        activation_budget: what a training step may have alive for activations at its peak (parameters, their gradients
            and inputs apart): bytes, a text such as "8GB", or a fraction of what plain backprop needs, 0.0 being the
            least possible and 1.0 keeping everything.  What is outside of chains is then recomputed as well.  It is
            planned for ``example_inputs``.  None reverses chains and leaves the rest as the model computes it.

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
    options = make_options(**{name: value for name, value in locals().items() if name not in _NO_OPTIONS})
    check_model(model)
    require_inputs(options, example_inputs)
    found = outlooks(model, replace(options, activation_budget=None), example_inputs)
    mm = _made_of(model, found, options.activation_budget, example_inputs)
    if example_inputs is not None and saving_methods(type(model)):
        mm.__dict__[EXAMPLE] = form_of(example_inputs)
    _warn_if_nothing(found, type(model).__name__)
    for path, part in parts_of(mm).items():
        if isinstance(part, Momentum):
            part.hooked.tell(mm.get_submodule(path), part.latest_entry().captured.hooked, stacklevel=2)
    return mm


def _made_of(model: Model, found: Mapping[str, Outlook], budget: int | float | None, example_inputs: Any) -> Model:
    """The momentumized model: with shells where that is possible, else captured whole."""
    scopes = sorted({outlook.scope for outlook in found.values() if outlook.scope is not None})
    if scopes:
        refuse_unplanned(replace(next(iter(found.values())).momentum.options, activation_budget=budget), scopes)
        return _linked(model, found, as_call(example_inputs))
    options = replace(next(iter(found.values())).momentum.options, activation_budget=budget)
    whole = found.get("")
    # A budget is for all that a step keeps, so where it can be had one graph of the whole is what is planned.
    if not options.learned and (whole is None or budget is None):
        captures = {path: outlook.entry for path, outlook in found.items()}
        mm = with_shells(model, captures, options, example_inputs)
        if mm is not None:
            return mm
    if whole is None:
        raise _unreached(model, found)
    guarded(whole.mm, guarded_methods(type(model), whole.entry.passed.plan.chains))
    guard_below(whole.mm, whole.momentum, example_inputs)
    whole.momentum.set_options(options)  # the budget last: nothing is planned within it twice
    if budget is not None:
        whole.momentum.first(whole.mm, example_inputs)
    return whole.mm  # type: ignore[return-value]


def _linked(model: Model, found: Mapping[str, Outlook], call: Call) -> Model:
    """The momentumized model, whose own Python links the parts that were found."""
    parts: dict[str, Part] = {}
    for path, outlook in found.items():
        owner, before = model.get_submodule(path), outlook.momentum
        side = side_of(owner, path, "forward", outlook.entry, before.options, type(before))
        assert outlook.call is not None
        parts[path] = Part(side, outlook.call, outlook.count, outlook.scope)
    mm = linked_model(model, parts, call)
    if mm is None:
        raise _unreached(model, found)
    return mm


def _unreached(model: nn.Module, found: Mapping[str, Outlook]) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__} can be followed in parts only ({', '.join(found)}), and reaches them otherwise "
        "than by its children: momentumize these, each in its place (model.part = mfx.momentumize(model.part))"
    )


def require_inputs(options: Options, example_inputs: Any) -> None:
    """Refuse a budget without the inputs that it is for."""
    if options.activation_budget is not None and example_inputs is None:
        raise OptionError(
            f"activation_budget={options.activation_budget!r} needs example_inputs: how many bytes a step keeps "
            "depends on their shapes. Pass example_inputs= as the model's forward takes them (on the meta device "
            "they cost nothing)"
        )


def momentum_version(model: Model, options: Options) -> Model:
    """The momentumized model for ``options``; one that needs Dynamo is captured by its first call."""
    check_model(model)
    momentum = Momentum(type(model), options)
    mm = shallow_copy(model, momentum)
    try:
        momentum.hooked.tell(mm, momentum.first(mm, None).captured.hooked, stacklevel=4)
    except CaptureError:
        if options.capture == "fx":
            raise
        return mm
    guard_below(mm, momentum, None)
    return mm


def check_model(model: Any) -> None:
    """Refuse what is not a plain module."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    refuse_wrapped(model)
    sides = ((path, module.__dict__.get(STATE)) for path, module in model.named_modules())
    if any(side is not None and side.place.prefix == path for path, side in sides):
        raise OptionError("model is momentumized already: give the original, or use mfx.set_gamma to change gamma")
    if "forward" in model.__dict__:
        raise InputTypeError(
            f"{type(model).__name__} has a forward of its own on the instance (model.forward = ...), which a "
            "captured graph would pass by: delete it, or put it into a class"
        )


def momentum_of(mm: nn.Module) -> Momentum:
    """The momentum side of a model that has one captured part, itself or a module inside."""
    parts = parts_of(mm)
    if len(parts) > 1:
        paths = list(parts)
        raise OptionError(
            f"{type(mm).__name__} has {len(paths)} captured parts ({', '.join(paths)}): ask for one, such as "
            f"mm.get_submodule({paths[0]!r})"
        )
    (momentum,) = parts.values()
    if not isinstance(momentum, Momentum):
        raise InputTypeError(f"{type(mm).__name__} is a MomentumNet, which needs no capture and has no graph")
    return momentum


def graph_of(mm: nn.Module) -> fx.Graph:
    """The rewritten graph of a momentumized model's latest capture, for printing.

    Args:
        mm: a momentumized model that has one captured part, or such a part of it.

    Raises:
        InputTypeError: ``mm`` has no captured part.
        OptionError: it has several; they are listed.

    Example:
        >>> import torchvision, mfx
        >>> mm = mfx.momentumize(torchvision.models.resnet18(weights=None), gamma=0.9)
        >>> [n.name for n in mfx.graph_of(mm.layer1).nodes if n.name.startswith("momentum")]
        ['momentum_0']
    """
    return momentum_of(mm).latest_entry().passed.rewritten.graph


def _warn_if_nothing(found: Mapping[str, Outlook], name: str) -> None:
    plans = [outlook.momentum.latest_entry().passed.plan for outlook in found.values()]
    if not any(plan.chains or plan.segments for plan in plans):
        reasons = {row.text for plan in plans for row in plan.rejections}
        why = f" ({'; '.join(sorted(reasons)[:3])})" if reasons else " (it has no residual add)"
        warnings.warn(
            f"nothing was rewritten in {name}{why}: the model comes back equivalent",
            NothingRewrittenWarning,
            stacklevel=3,
        )
