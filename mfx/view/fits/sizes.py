"""Sizes: example inputs of any size, and what a training step needs with them.

1. All tensors of the example vary that are as long in the dimension as the first one that has it.
2. To foresee a step they are fake tensors, which hold no memory; the model is captured and planned for them as for a
   call of its own, so that whatever its Python does at that size is in it.
3. To take a real step, the example's own rows are repeated; where the example has no values, they are made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mfx.budget.largest import Largest
from mfx.budget.owned import bytes_of, owned_by
from mfx.capture import Call, as_call
from mfx.errors import CaptureError, InputTypeError, MfxError, OptionError, TooLittleError
from mfx.graph.shapes import Fake, asking
from mfx.memory import format_bytes
from mfx.model.outlook import outlooks
from mfx.options import Options
from mfx.torch_versions import FakeTensor, pytree
from mfx.view.footprint import StepMemory, peaks_of, step_memory

Make = Callable[[Tensor, list[int]], Tensor]
"""A tensor like one of the example, of another shape."""


@dataclass(frozen=True, eq=False)
class Sizes:
    """A model and an example whose dimension ``dim`` is ``start`` long; ``keyed`` where that is a dict.

    ``steps`` are what a step needs, for the sizes that were asked, and ``refused`` why others were not possible.
    """

    model: nn.Module
    call: Call
    keyed: bool
    dim: int
    start: int
    options: Options
    optimizer: Any
    steps: dict[int, StepMemory] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, example_inputs: Any, dim: Any, options: Options, optimizer: Any) -> Sizes:
        """The sizes of ``example_inputs``.

        Raises:
            OptionError, InputTypeError: they have no dimension ``dim`` that could vary.
        """
        call = as_call(example_inputs)
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise InputTypeError(f"dim={dim!r} is a {type(dim).__name__}: give the dimension that varies, as an int")
        if any(tensor.is_nested for tensor in call.tensors):
            raise OptionError("example_inputs has nested tensors, in which a size is no one number: pad them")
        sizes = [tensor.shape[dim] for tensor in call.tensors if _has(tensor, dim)]
        if not sizes or not sizes[0]:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in call.tensors) or "no tensor"
            raise OptionError(
                f"dim={dim}: no input has that dimension, or it is empty there (received {shapes}). Name one that "
                "the first input has"
            )
        return Sizes(model, call, isinstance(example_inputs, dict), dim, sizes[0], options, optimizer)

    def fake(self, size: int) -> Any:
        """The example inputs of a size, as fake tensors."""
        mode = Fake(self.model, []).mode

        def make(value: Tensor, shape: list[int]) -> Tensor:
            with mode:
                return torch.empty(shape, dtype=value.dtype, device=self._device(value))

        return self._example(size, make)

    def real(self, size: int) -> Any:
        """The example inputs of a size, with values."""

        def make(value: Tensor, shape: list[int]) -> Tensor:
            if value.is_meta or isinstance(value, FakeTensor):
                kind = torch.randn if value.is_floating_point() else torch.zeros
                return kind(shape, dtype=value.dtype, device=self._device(value))
            rows = torch.arange(shape[self.dim] if _has(value, self.dim) else 0, device=value.device)
            found = value.detach()
            return found.index_select(self.dim, rows % found.shape[self.dim]) if len(rows) else found

        return self._example(size, make)

    def _device(self, value: Tensor) -> torch.device:
        given = value.device
        return next((held.device for held in self.model.parameters()), torch.device("cpu")) if value.is_meta else given

    def _example(self, size: int, make: Make) -> Any:
        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            shape = list(value.shape)
            if _has(value, self.dim) and shape[self.dim] == self.start:
                shape[self.dim] = size
            return asking(value, make(value, shape))

        args, kwargs = pytree.tree_unflatten([leaf(value) for value in self.call.leaves], self.call.spec)
        return kwargs if self.keyed else args

    def needs(self, size: int) -> float | None:
        """The bytes that a step of a size needs; infinite where the budget is too little for it, None if refused."""
        try:
            if size not in self.steps:
                self.steps[size] = self._step(size)
        except TooLittleError as error:
            self.refused[size] = str(error)
            return math.inf
        except MfxError as error:
            if size == self.start:
                raise
            self.refused[size] = f"the model takes no size of {size} ({str(error).splitlines()[0]})"
            return None
        return self.steps[size].total

    def _step(self, size: int) -> StepMemory:
        name = type(self.model).__name__
        with torch.random.fork_rng(devices=[]):  # a velocity's factory may draw
            found = outlooks(self.model, self.options, self.fake(size))
            whole = found.get("")
            if whole is None or whole.call is None:
                raise CaptureError(
                    f"{name} can be followed in parts only ({', '.join(found)}), and what a step needs is foreseen of "
                    "a whole model: fit the parts"
                )
            owned = owned_by(whole.mm, self.optimizer)
            peaks, why = peaks_of(whole, plain=False)
        if peaks is None:
            raise CaptureError(f"what a step of {name} needs cannot be foreseen, since it cannot be run: {why}")
        return step_memory(owned, bytes_of(whole.call.tensors), peaks.ours)

    def require_others(self, found: Largest) -> None:
        """Refuse a model that takes the example's size alone."""
        others = [size for size in found.needs if size != self.start]
        if not others or any(found.needs[size] is not None for size in others):
            return
        if found.size and self.start > 1 and self.needs(self.start - 1) is not None:
            return
        raise OptionError(
            f"dim={self.dim} of the inputs of {type(self.model).__name__} cannot vary: it is {self.start} in the "
            f"example, and {self.refused[others[0]]}. Name another dimension"
        )

    def too_little(self, room: int) -> TooLittleError:
        """Why no size fits."""
        if not self.steps:
            return TooLittleError(self.refused[min(self.refused)])
        least = min(self.steps)
        step = self.steps[least]
        return TooLittleError(
            f"memory={format_bytes(room)} is too little: a step of size {least} in dimension {self.dim} needs "
            f"{format_bytes(step.total)} ({step.total} bytes). Give that, or a smaller activation_budget (0.0 is the "
            "least)"
        )


def _has(tensor: Tensor, dim: int) -> bool:
    return -tensor.dim() <= dim < tensor.dim()
