"""Dropped: what autograd saves of a run is dropped, and made anew, when it is asked for, by a second run.

1. In the first run each tensor that autograd saves is exchanged for its number.
2. When backward asks for one, the function runs again, from inputs that are kept as autograd keeps them (one that was
   changed in place raises, M8).  What autograd saves then is what the numbers stand for.  The second run ends with the
   last of it (*early stop*): of a branch that ends in a matrix product, that product is not computed again.
3. The last value that the first run had computed is not kept, but the L2 norm of a sample of it is.  How far that of
   the second run is from it is told, so that a function that does not repeat itself is noticed
   (:mod:`mfx.run.detector`).
4. What a backward has not asked for goes when it ends.

Source: torch/utils/checkpoint.py (``use_reentrant=False``), whose rules 2 and 4 these are; it compares shapes alone.
Known limits: where a node asks for the same tensor twice in one backward, the function runs once more.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfx.errors import BackwardError
from mfx.run.conditions import is_symbolic
from mfx.run.detector import size_of_sample
from mfx.run.recompute import saved_tensors
from mfx.torch_versions import when_backward_ends

Told = Callable[[Tensor, torch.dtype], None]
"""Takes the relative difference of the two runs, and the dtype that they have there."""

KEEPING = "keep what it saves: a block with exclude= or reversible=False, a segment with a larger activation_budget="
"""What else can be done about a function that cannot run again."""


def dropping(
    name: str,
    first: Callable[..., Any],
    again: Callable[..., Any],
    inputs: Sequence[Any],
    told: Told,
) -> Any:
    """``first(*inputs)``, of which nothing is kept for backward but ``inputs``.

    Args:
        name: what it is called in errors.
        first: the function.
        again: what runs in backward, with other tensors of the same values: it saves the same in the same order.
        inputs: tensors, and values that are kept as they are.
        told: asked in backward.
    """
    frame = _Frame(name, again, inputs, told)
    with torch.autograd.graph.saved_tensors_hooks(frame.drop, frame.made):
        values = first(*inputs)
    frame.end()
    return values


_turns = itertools.count()


class _Enough(BaseException):
    """Ends the second run; no ``except Exception`` of a model's own is meant by it."""


class _Frame:
    """The runs of one function: ``seen`` tells what the first saved, ``values`` are what backward takes."""

    def __init__(self, name: str, again: Callable[..., Any], inputs: Sequence[Any], told: Told) -> None:
        self.name = name
        self.again = again
        self.told = told
        self.inputs = _Inputs.of(inputs)
        self.seen: list[tuple[torch.Size, torch.dtype]] = []
        self.values: dict[int, Tensor] = {}
        self.last: tuple[int, Tensor] | None = None
        self.turn = next(_turns)

    def drop(self, tensor: Tensor) -> int:
        """Take the number of a tensor that autograd saves in the first run."""
        self.seen.append((tensor.shape, tensor.dtype))
        number = len(self.seen) - 1
        if tensor.is_floating_point() and not _is_parameter(tensor):
            self.last = number, tensor
        return number

    def end(self) -> None:
        """The first run is over."""
        if self.last is not None:
            number, tensor = self.last
            self.last = None if is_symbolic(tensor) else (number, size_of_sample(tensor, self.turn))

    def made(self, number: int) -> Tensor:
        """The tensor of this number, made anew."""
        if number not in self.values:
            self._run()
        return self.values.pop(number)

    def _run(self) -> None:
        found: dict[int, Tensor] = {}

        def take(tensor: Tensor) -> int:
            number = len(found)
            if (tensor.shape, tensor.dtype) != self.seen[number]:
                raise self._other(f"saves {_shown(tensor.shape, tensor.dtype)} where it saved", number)
            found[number] = tensor.detach()
            if len(found) == len(self.seen):
                raise _Enough
            return number

        saved = torch.autograd.graph.saved_tensors_hooks(take, found.__getitem__)
        with contextlib.suppress(_Enough), torch.enable_grad(), saved:
            self.again(*self.inputs.values(self.name))
        if len(found) < len(self.seen):
            raise self._other("saves nothing more where it saved", len(found))
        self.values = found
        if self.last is not None:
            number, size = self.last
            now = size_of_sample(found[number], self.turn).double()
            off = (now - size.double()).abs() / now.clamp_min(torch.finfo(torch.float32).tiny)
            self.told(off, found[number].dtype)
        forget = weakref.WeakMethod(self._forget)  # the frame is to go as soon as autograd lets it
        when_backward_ends(lambda: (forget() or bool)())

    def _forget(self) -> None:
        self.values.clear()

    def _other(self, what: str, number: int) -> BackwardError:
        return BackwardError(
            f"{self.name}: run again in backward, it {what} {_shown(*self.seen[number])} in forward, so its gradients "
            "would be of another function. Let it do the same each time (no state outside of buffers, no random "
            f"numbers from elsewhere than torch), or {KEEPING}"
        )


class _Inputs(torch.autograd.Function):
    """A node that nothing leads to: it keeps tensors as autograd does."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *inputs: Any) -> Tensor:
        ctx.places = [isinstance(value, Tensor) for value in inputs]
        ctx.plain = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.asking = [isinstance(value, Tensor) and value.requires_grad for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise AssertionError("nothing leads here")

    @staticmethod
    def of(inputs: Sequence[Any]) -> _Kept:
        """``inputs``, kept."""
        return _Kept(_Inputs.apply(torch.empty((), requires_grad=True), *inputs))  # type: ignore[arg-type]


class _Kept:
    """Inputs of a function that is to run again."""

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor

    def values(self, name: str) -> list[Any]:
        """The inputs without their history."""
        ctx: Any = self.anchor.grad_fn
        saved = iter(saved_tensors(ctx, f"an input of {name}"))
        tensors = (
            next(saved).detach().requires_grad_(asking) if there else None
            for there, asking in zip(ctx.places, ctx.asking, strict=True)
        )
        return [value if one is None else one for one, value in zip(tensors, ctx.plain, strict=True)]


def _is_parameter(tensor: Tensor) -> bool:
    base = tensor._base if tensor._is_view() else tensor
    return base is not None and base.is_leaf and base.requires_grad


def _shown(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"a tensor of shape {tuple(shape)} in {dtype}"
