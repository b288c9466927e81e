"""Pipeline: the one way through the house, for one model and one form of call.

    capture -> find -> plan -> rewrite

Each step takes a value and gives one; an :class:`Entry` holds them all, and runs the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from mfx.capture import Capture, Signature, as_call, capture, default_signature
from mfx.dynamo import DynamoCapture, capture_dynamo
from mfx.errors import OptionError
from mfx.find import Found, find, own_add
from mfx.options import Options
from mfx.plan import Plan, plan
from mfx.rewrite import Rewritten, rewrite
from mfx.shapes import propagate_shapes
from mfx.whole import named_modules


@dataclass(frozen=True, eq=False)
class Entry:
    """One captured and rewritten form of a model.

    ``sizes`` are the bytes each original node keeps for backward, where shapes are known.
    """

    capture: Capture | DynamoCapture
    found: Found
    plan: Plan
    rewritten: Rewritten
    sizes: dict[fx.Node, int]

    def run(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output."""
        return self.capture.call(root, args, kwargs, self.rewritten.run)


def first_call(
    forward: Any, options: Options, example_inputs: Any
) -> tuple[Options, Signature, list[torch.Tensor] | None]:
    """The form of call to capture first: the example's, or the one the signature of forward suggests."""
    if example_inputs is None:
        return options, default_signature(forward), None
    args, kwargs = as_call(example_inputs)
    return replace(options, shapes=True), *Signature.of(args, kwargs)


def prepare(
    model: nn.Module,
    forward: Any,
    signature: Signature,
    options: Options,
    tensors: list[torch.Tensor] | None = None,
) -> Entry:
    """capture -> find -> plan -> rewrite, for calls of the form ``signature``."""
    captured = capture(model, forward, signature, named_modules(model, options))
    sizes = propagate_shapes(captured.graph, model, tensors) if options.shapes and tensors is not None else {}
    found = find(captured.graph, model, kind=options.kind, only_whole=options.only_whole)
    planned = plan(found, options)
    require_whole(model, found, planned)
    return Entry(captured, found, planned, rewrite(found, planned), sizes)


def prepare_dynamo(
    model: nn.Module, forward: Any, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Entry:
    """The same with Dynamo, for a call of its own; what each node keeps for backward is left open."""
    captured = capture_dynamo(model, forward, args, kwargs, named_modules(model, options))
    found = find(captured.graph, model, kind=options.kind, only_whole=options.only_whole)
    planned = plan(found, options)
    require_whole(model, found, planned)
    return Entry(captured, found, planned, rewrite(found, planned), {})


def require_whole(model: nn.Module, found: Found, planned: Plan) -> None:
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
