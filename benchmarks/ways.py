"""The ways to take a step: plainly, with checkpoints, by a compiler's budget, momentumnet, mfx at several budgets.

A :class:`Way` makes of a sample the model that is called in its place.  It may raise :class:`NotHere`, with what is
missing, where it cannot be had.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import Case, Sample

import mfx

BUDGETS = (None, 0.0, 0.25, 0.5, 0.75, 1.0)


class NotHere(Exception):
    """This way cannot be had for this sample, or on this machine; says why."""


@dataclass(frozen=True)
class Made:
    """The model to call, what surrounds each step, and the bytes that were predicted for its peak."""

    model: nn.Module
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    predicted: int | None = None
    where: str = ""


@dataclass(frozen=True)
class Way:
    """``make`` gives the model; ``only`` are patterns of the cases that this is measured for."""

    name: str
    make: Callable[[Case, Sample], Made] = field(repr=False)
    only: tuple[str, ...] = ("*",)

    def takes(self, case: Case) -> bool:
        """Whether it is measured for ``case``."""
        return any(fnmatch.fnmatchcase(case.name, pattern) for pattern in self.only)


def plain(case: Case, sample: Sample) -> Made:
    return Made(sample.model)


def checkpointed(case: Case, sample: Sample) -> Made:
    """A copy, on the same parameters, with torch's non-reentrant checkpoint around every block."""
    shared = {id(tensor): tensor for tensor in (*sample.model.parameters(), *sample.model.buffers())}
    model = copy.deepcopy(sample.model, shared)
    blocks = [module for module in model.modules() if type(module).__name__ in case.blocks]
    if not blocks:
        raise LookupError(f"{case.name} has no module of {case.blocks}")
    for block in blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner, **kw: checkpoint(inner, *args, use_reentrant=False, **kw)
    return Made(model)


def offloaded(case: Case, sample: Sample) -> Made:
    """Checkpoints whose inputs wait in pinned host memory; on a CPU there is no other memory to go to."""
    if next(sample.model.parameters()).device.type == "cpu":
        raise NotHere("offloading needs an accelerator: on the CPU activations are in host memory already")
    return Made(checkpointed(case, sample).model, lambda: torch.autograd.graph.save_on_cpu(pin_memory=True))


def compiled(budget: float | None) -> Callable[[Case, Sample], Made]:
    """torch.compile, where ``budget`` is given with its partitioner's activation_memory_budget."""

    def make(case: Case, sample: Sample) -> Made:
        import torch._functorch.config as config

        torch._dynamo.reset()
        model = torch.compile(sample.model)
        patch = contextlib.nullcontext if budget is None else lambda: config.patch(activation_memory_budget=budget)
        return Made(model, patch)

    return make


def momentumnet(case: Case, sample: Sample) -> Made:
    """momentumnet's reversible chain of the same branches."""
    if not sample.branches:
        raise NotHere("momentumnet takes a list of branches, and this model has none to give")
    try:
        from momentumnet import MomentumNet
    except ImportError:
        raise NotHere("momentumnet is not installed (pip install '.[bench]')") from None

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = MomentumNet(list(sample.branches), gamma=0.9, use_backprop=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    return Made(Called())


def rewritten(gamma: float, budget: float | None, compile: bool = False) -> Callable[[Case, Sample], Made]:
    """mfx at ``gamma`` and ``budget``."""

    def make(case: Case, sample: Sample) -> Made:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mfx.MfxWarning)
            mm = mfx.momentumize(sample.model, gamma, example_inputs=sample.inputs, activation_budget=budget)
        found = None if budget is None else forecast_of(mm)
        if compile:
            torch._dynamo.reset()
            return Made(torch.compile(mm))
        return Made(mm) if found is None else Made(mm, predicted=found.peak, where=found.where)

    return make


def forecast_of(mm: nn.Module) -> Any:
    """What the plan of a momentumized model predicts for a step."""
    return mm.__dict__["_mfx"].latest_entry().passed.plan.forecast


def _ours() -> Iterator[Way]:
    for gamma in (0.9, 0.0):
        for budget in BUDGETS:
            only = ("*",) if budget in (None, 0.0, 0.5) or (gamma and budget == 1.0) else FRONTIER
            yield Way(name_of(gamma, budget), rewritten(gamma, budget), only)


def name_of(gamma: float, budget: float | None) -> str:
    """The name of mfx at a gamma and a budget."""
    return f"mfx, gamma {gamma:g}" + ("" if budget is None else f", budget {budget:g}")


FRONTIER = ("transformer 24", "convolution 24", "resnet50", "gpt2")
"""The cases that are measured at every budget."""
_STACKS = ("mlp *", "convolution *", "transformer *")
_COMPILED = ("mlp 6", "transformer 6")

WAYS: tuple[Way, ...] = (
    Way("plain", plain),
    Way("checkpoint", checkpointed),
    Way("checkpoint, offload", offloaded),
    Way("momentumnet", momentumnet, _STACKS),
    *_ours(),
    Way("compiled", compiled(None), _COMPILED),
    Way("compiled, budget 0.5", compiled(0.5), _COMPILED),
    Way("compiled, budget 0", compiled(0.0), _COMPILED),
    Way("mfx, gamma 0.9, compiled", rewritten(0.9, None, compile=True), _COMPILED),
)
"""Every way, in the order of the tables."""


def chosen(items: Iterable[Any], patterns: Iterable[str]) -> list[Any]:
    """Those whose name one of the ``patterns`` matches, or all."""
    patterns = list(patterns)
    return [item for item in items if not patterns or any(fnmatch.fnmatchcase(item.name, one) for one in patterns)]
