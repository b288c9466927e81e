"""Footprint: all that a training step has alive, and so whether it fits.

1. Parameters, buffers, inputs and the optimizer's state are there all the time (:mod:`mfx.budget.owned`).
2. Gradients are made in backward, while activations go: the most of both together is that of the graph that will run
   (:mod:`mfx.budget.step`), not the sum of both.
3. When the optimizer steps, all gradients and the outputs are there, and what its step needs for itself.

The larger of 2 and 3 is added to 1.  Where gradients are kept from step to step (accumulation,
``zero_grad(set_to_none=False)``) they are there all the time as well.

Known limits: workspaces of kernels, what an allocator loses to fragments, and the device's own context (some 500 MB on
CUDA) are not in it; nor is a loss that is computed outside of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate
from torch import nn

from mfx.budget.owned import Owned
from mfx.budget.step import Peak, peak_of
from mfx.memory import format_bytes
from mfx.model.outlook import Outlook


@dataclass(frozen=True, eq=False)
class Peaks:
    """The peak of a step of a rewritten graph, by root, for its inputs; ``plain`` is that of the original graph."""

    root: nn.Module
    inputs: list[Any]
    ours: Peak
    plain: Peak | None = None


def peaks_of(outlook: Outlook, plain: bool = True) -> tuple[Peaks | None, str]:
    """The peaks for the call that an outlook is for; where there are none, the reason if there is a call.

    That is for torch to say: sizes depend on values, or the model has no backward that autograd lets through.
    """
    if outlook.call is None:
        return None, ""
    root, passed = outlook.mm, outlook.entry.passed
    inputs = outlook.entry.captured.inputs(root, outlook.call)
    try:
        before = peak_of(passed.found.flow.graph, root, inputs) if plain else None
        return Peaks(root, inputs, peak_of(passed.rewritten.graph, root, inputs, rewritten=True), before), ""
    except RuntimeError as error:
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step has alive, by what they are for.

    ``optimizer_state`` is None where no optimizer was named; ``optimizer_step`` is what its step needs for itself.
    ``activations`` is their peak, gradients apart, and ``where`` what stands there; without example inputs neither is
    known.  ``total`` is the most that is alive at once, where gradients are made anew in each step, and
    ``total_accumulating`` where they stay.  ``..._plain`` are those of plain backprop; ``unknown`` says why
    activations are not known where there are inputs.
    """

    parameters: int
    gradients: int
    buffers: int
    optimizer_state: int | None
    optimizer_step: int
    total: int
    inputs: int | None = None
    activations: int | None = None
    where: str = ""
    total_accumulating: int | None = None
    activations_plain: int | None = None
    total_plain: int | None = None
    unknown: str = ""

    def lines(self) -> Iterator[str]:
        """The table."""
        known = self.activations is not None
        rows = [
            ("parameters", self.parameters, None),
            ("buffers", self.buffers, None),
            ("gradients", self.gradients, None),
            ("optimizer's state", self.optimizer_state, None),
            ("optimizer's step, for itself", self.optimizer_step or None, None),
            ("inputs", self.inputs, None),
            ("activations, at most", self.activations, self.activations_plain),
            ("all, at most" if known else "all but activations", self.total, self.total_plain),
            ("all, where gradients are accumulated", self.total_accumulating, None),
        ]
        cells = [(name, *map(_bytes, sizes)) for name, *sizes in rows if sizes[0] is not None]
        plain = ["plain backprop"] if self.total_plain is not None else []
        shown = [row if plain else row[:2] for row in cells]
        yield from tabulate(shown, headers=["a training step", "bytes", *plain], disable_numparse=True).splitlines()
        if self.unknown:
            yield f"activations are not known: {self.unknown}"


def step_memory(
    owned: Owned, inputs: int | None = None, peak: Peak | None = None, plain: Peak | None = None
) -> StepMemory:
    """What a step needs, of what is owned, the inputs' bytes, and the peaks of its graph and of the plain one."""
    always = owned.parameters + owned.buffers + (owned.state or 0) + (inputs or 0)
    held = (owned.parameters, owned.gradients, owned.buffers, owned.state, owned.updating)
    if peak is None:
        return StepMemory(*held, total=always + owned.gradients + owned.updating, inputs=inputs)

    def total(one: Peak) -> int:
        return always + max(one.with_gradients, owned.gradients + one.left + owned.updating)

    accumulating = always + owned.gradients + max(peak.bytes, peak.left + owned.updating)
    found = StepMemory(*held, total(peak), inputs, peak.bytes, peak.where, max(accumulating, total(peak)))
    if plain is None:
        return found
    return replace(found, activations_plain=plain.bytes, total_plain=total(plain))


def _bytes(size: int | None) -> str:
    return "" if size is None else format_bytes(size)
