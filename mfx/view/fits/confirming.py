"""Confirming: what two real training steps need, by the allocator of the model's device.

1. The model is momentumized for the inputs and trained for two steps: in the second one the optimizer's state and all
   that kernels keep is there.
2. The most that the allocator has handed out meanwhile is counted, above what was there before, and with the model's
   own parameters and buffers.
3. Parameters, buffers, gradients and random generators are put back.

A device that is out of memory needs infinitely much.  Devices whose module of torch has no count of bytes (the CPU)
say nothing: None.
Known limits: the loss is that of :mod:`mfx.budget.step`; copies of parameters and buffers wait in the
memory of the CPU meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mfx.budget.owned import bytes_of, optimizer_of
from mfx.capture import as_call
from mfx.model import momentumize
from mfx.options import Optimizer
from mfx.torch_versions import pytree

_STEPS = 2


def measured_step(
    model: nn.Module, make_inputs: Callable[[], Any], optimizer: Optimizer, **options: Any
) -> float | None:
    """The bytes that a training step of the momentumized ``model`` needs on its device.

    Args:
        model: the original model.
        make_inputs: makes the inputs; called only where the device tells.
        optimizer: as :func:`mfx.options.check_optimizer` gives it.
        **options: those of :func:`mfx.momentumize`.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("meta"))
    if device.type == "meta":
        return None
    meter: Any = torch.get_device_module(device)
    if not hasattr(meter, "max_memory_allocated"):
        return None
    with _unchanged(model, device):
        try:
            example_inputs = make_inputs()
            mm = momentumize(model, example_inputs=example_inputs, **options)
            held = bytes_of([*mm.parameters(), *mm.buffers(), *as_call(example_inputs).tensors])
            before = meter.memory_allocated(device)
            meter.reset_peak_memory_stats(device)
            _train(mm, example_inputs, optimizer)
            return meter.max_memory_allocated(device) - before + held
        except torch.OutOfMemoryError:
            return math.inf


def _train(mm: nn.Module, example_inputs: Any, optimizer: Optimizer) -> None:
    call, updates = as_call(example_inputs), optimizer_of(optimizer, mm)
    for _ in range(_STEPS):
        mm.zero_grad()
        output = mm(*call.args, **call.kwargs)
        ends = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward([end for end in ends if end.dim() == 0] or [(end * 1).sum() for end in ends])
        if updates is not None:
            updates()


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put parameters, buffers, gradients and random generators back."""
    held = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().to("cpu", copy=True) for tensor in held]
    gradients = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    devices = [] if device.type == "cpu" else [device.index or 0]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, values, strict=True):
                tensor.copy_(value)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
