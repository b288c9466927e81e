"""Traffic: what went into and came out of each module in one run of a model, as it is and without gradient.

The run is in eval mode, in which no block is dropped; in the mode the model is in, where it cannot run in that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from mfx.capture import Call
from mfx.model.owners import untouched

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Traffic:
    """The calls of each module, and what they gave, by path."""

    calls: Mapping[str, list[Call]]
    outputs: Mapping[str, list[Any]]


def traffic_within(model: nn.Module, call: Call) -> Traffic:
    """The calls of each module in one run of the model."""

    def noted() -> Traffic:
        found = Traffic({}, {})
        with contextlib.ExitStack() as stack:
            for path, module in model.named_modules():
                stack.enter_context(_noting(module, found.calls, found.outputs, path))
            model(*call.args, **call.kwargs)
        return found

    return in_a_run(model, noted)


def in_a_run(model: nn.Module, run: Callable[[], Result]) -> Result:
    """What ``run``, which runs the model once, gives; the model is left as it was."""
    modes = [(module, module.training) for module in model.modules()]
    with untouched(model), torch.no_grad():
        try:
            model.eval()
            return run()
        except Exception:
            if not any(mode for _, mode in modes):
                raise
        finally:
            for module, mode in modes:
                module.training = mode
        return run()


@contextlib.contextmanager
def _noting(module: nn.Module, calls: Any, outputs: Any, path: str) -> Iterator[None]:
    calls[path], outputs[path] = [], []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls[path].append(Call(args, kwargs))

    def after(_: nn.Module, args: Any, output: Any) -> None:
        outputs[path].append(output)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
