"""Fitting: the largest batch, or sequence, whose training step fits a memory.

1. What a step of a size needs is foreseen as in a report (:mod:`mfx.view.footprint`), within the budget, on fake
   tensors (:mod:`mfx.view.fits.sizes`).
2. Sizes are searched (:mod:`mfx.budget.largest`): the one that is given fits, the next one was asked and does not.
3. On a device whose allocator tells, two real steps are taken at that size (:mod:`mfx.view.fits.confirming`); where
   they need more than there is, the size goes down until they do not.

Known limits: those of the footprint.  Sizes that a model takes only as multiples of something (the side of an image in
patches) are not searched for.  What a budget keeps changes by whole blocks, so a step may need a little less at a
larger size: then a size beyond the one found may fit as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from mfx.budget.largest import largest
from mfx.errors import TooLittleError
from mfx.memory import format_bytes
from mfx.model.conversion import check_model
from mfx.options import Gamma, Optimizer, check_bytes, check_optimizer, make_options
from mfx.view.fits.confirming import measured_step
from mfx.view.fits.sizes import Sizes
from mfx.view.footprint import StepMemory


@dataclass(frozen=True)
class Fit:
    """The largest ``size`` of dimension ``dim`` whose step fits ``memory``; ``str()`` is a table.

    ``step`` is what a step needs then, by what it is for, as it is foreseen; ``next_bytes`` what the next size would
    need; where that is None, ``limit`` says why there is no next size.  ``measured`` is what two real steps on the
    model's device needed; None where its allocator does not tell (the CPU).
    """

    model: str
    dim: int
    memory: int
    activation_budget: int | float | None
    size: int
    step: StepMemory
    next_bytes: int | None
    limit: str = ""
    measured: int | None = None

    @property
    def bytes(self) -> int:
        """What a step needs at most, as it is foreseen."""
        return self.step.total

    def to_dict(self) -> dict[str, Any]:
        """The value as JSON can hold it."""
        return {**asdict(self), "bytes": self.bytes}

    def __str__(self) -> str:
        budget = "" if self.activation_budget is None else f" with activation_budget={self.activation_budget!r}"
        after = self.limit if self.next_bytes is None else f"{self.size + 1} would need {_exactly(self.next_bytes)}"
        real = "" if self.measured is None else f", two real steps needed {_exactly(self.measured)}"
        lines = (
            f"{self.model}: {self.size} in dimension {self.dim} is the most that fits {_exactly(self.memory)}{budget}",
            f"a step needs {_exactly(self.bytes)}, as foreseen{real}; {after}",
            f"most is alive at: {self.step.where}",
            "",
        )
        return "\n".join([*lines, *self.step.lines()])


def _exactly(size: int) -> str:
    return f"{format_bytes(size)} ({size:,} bytes)"


def fit(
    model: nn.Module,
    example_inputs: Any,
    memory: int | str,
    *,
    dim: int = 0,
    gamma: Gamma = 0.9,
    optimizer: Optimizer = None,
    **options: Any,
) -> Fit:
    """The largest batch (or whatever dimension ``dim`` is) with which a training step of ``model`` fits ``memory``.

    Args:
        model: the original model.
        example_inputs: tensor, tuple or dict, as the model's forward takes them, of a size that it takes; tensors on
            the meta device do.
        memory: bytes, or a text such as "8GB": what there is for parameters, gradients, buffers, the optimizer's
            state, inputs and activations.
        dim: the dimension that varies, of all inputs that are as long in it as the first one that has it.
        gamma: as for :func:`mfx.momentumize`.
        optimizer: what trains the model, as for :func:`mfx.report`; None counts no state.
        **options: the other arguments of :func:`mfx.momentumize`, such as ``activation_budget``.

    Returns:
        A :class:`Fit`.

    Raises:
        OptionError: no size fits (it says the least that is needed), the model does not take other sizes, or no input
            has the dimension.
        InputTypeError, CaptureError: as :func:`mfx.momentumize`.

    Example:
        >>> import torch, torchvision, mfx
        >>> model = torchvision.models.resnet18(weights=None)
        >>> found = mfx.fit(model, torch.empty(2, 3, 64, 64, device="meta"), "500MB", optimizer="adam")
        >>> found.bytes <= 500_000_000 < found.next_bytes
        True
    """
    room, maker = check_bytes("memory", memory), check_optimizer(optimizer)
    check_model(model)
    sizes = Sizes.of(model, example_inputs, dim, make_options(gamma, **options), maker)
    found = largest(sizes.needs, room, sizes.start)
    sizes.require_others(found)
    if not found.size:
        raise sizes.too_little(room)

    def really(size: int) -> float | None:
        return measured_step(model, lambda: sizes.real(size), maker, gamma=gamma, **options)

    size, measured, limit = _confirmed(sizes, found.size, room, really)
    after = found.needs[size + 1] if size == found.size else None
    return Fit(
        model=type(model).__name__,
        dim=dim,
        memory=room,
        activation_budget=sizes.options.activation_budget,
        size=size,
        step=sizes.steps[size],
        next_bytes=None if after is None or after == math.inf else int(after),
        limit=limit or sizes.refused.get(size + 1, ""),
        measured=measured,
    )


def _confirmed(
    sizes: Sizes, size: int, room: int, really: Callable[[int], float | None]
) -> tuple[int, int | None, str]:
    """A size whose real steps fit, what they need (None where that is not told), and what a larger one needed.

    Raises:
        TooLittleError: none fits.
    """
    limit = ""
    while size and sizes.needs(size) not in (None, math.inf):
        needed = really(size)
        if needed is None or needed <= room:
            return size, None if needed is None else int(needed), limit
        told = "more than the device has" if needed == math.inf else format_bytes(int(needed))
        limit = f"two real steps of size {size} needed {told}"
        size = min(size - 1, int(size * (0.9 if needed == math.inf else room / needed)))
    raise TooLittleError(
        f"memory={format_bytes(room)} is too little: {limit}, and a smaller size is not possible. Give more, or a "
        "smaller activation_budget (0.0 is the least)"
    )
