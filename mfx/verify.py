"""Verify: the reversible run against the stored run of the same recurrence, on the caller's own data.

1. Both run from the same weights, buffers and generator state, in the mode the model is in.
2. The loss is the sum of all floating outputs with fixed random weights, so every output counts.
3. Compared are outputs, gradients of all parameters and floating inputs, and each chain's x_0 with the one
   that the backward reconstructs.

Buffers, gradients and random generators are afterwards as they were before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx.capture import as_call
from mfx.memory import kept_bytes
from mfx.model import momentumize
from mfx.options import Gamma
from mfx.precision import default_tolerance
from mfx.report import format_bytes
from mfx.reversible import observing


@dataclass(frozen=True)
class Verification:
    """How the reversible run compares with the stored one; ``str()`` is a table.

    Errors are relative in the L2 norm: ``output_error`` over all outputs, ``gradient_error`` over all gradients,
    ``gradient_errors`` for each parameter name (and ``input 0`` ...), ``reconstruction_error`` the largest over
    the chains' inputs.  ``saved_bytes`` are kept for backward by the reversible run, ``saved_bytes_stored`` by
    the stored one.  ``worst`` names the largest gradient error among parameters whose gradient is not negligible
    (a bias before a BatchNorm has none but rounding noise).
    """

    model: str
    output_error: float
    gradient_error: float
    gradient_errors: dict[str, float]
    reconstruction_error: float
    saved_bytes: int
    saved_bytes_stored: int
    tolerance: float
    worst: str

    @property
    def ok(self) -> bool:
        """Whether outputs and gradients agree within ``tolerance``."""
        return self.output_error <= self.tolerance and self.gradient_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The verification as values that JSON can hold."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        share = self.saved_bytes / self.saved_bytes_stored if self.saved_bytes_stored else 1.0
        rows = [
            ("output error", f"{self.output_error:.1e}"),
            ("gradient error", f"{self.gradient_error:.1e}"),
            (f"worst gradient: {self.worst}", f"{self.gradient_errors.get(self.worst, 0.0):.1e}"),
            ("reconstruction error", f"{self.reconstruction_error:.1e}"),
            ("kept for backward, stored", format_bytes(self.saved_bytes_stored)),
            ("kept for backward, reversible", f"{format_bytes(self.saved_bytes)} ({share:.0%})"),
            ("tolerance", f"{self.tolerance:.0e}"),
            ("verdict", "ok" if self.ok else "NOT OK"),
        ]
        return tabulate(rows, headers=[self.model, "reversible against stored"], disable_numparse=True)


@dataclass
class _Run:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    saved: int


def verify(
    model: nn.Module, example_inputs: Any, gamma: Gamma = 0.9, *, tolerance: float | None = None, **options: Any
) -> Verification:
    """Compare the reversible run with the stored run of the same recurrence on ``example_inputs``.

    Args:
        model: the original model; in train mode dropout and BatchNorm are alive in the comparison.
        example_inputs: tensor, tuple or dict, as the model's forward takes them.
        gamma: as for :func:`mfx.momentumize`.
        tolerance: relative error allowed; None is 1e-10 for float64 parameters, 1e-4 for float32, 1e-2 below.
        **options: the other arguments of :func:`mfx.momentumize`.

    Returns:
        A :class:`Verification`; its ``ok`` says whether both agree.

    Raises:
        OptionError, InputTypeError, CaptureError: as :func:`mfx.momentumize`.

    Example:
        >>> import torch, torchvision, mfx
        >>> model = torchvision.models.resnet18(weights=None).double()
        >>> mfx.verify(model, torch.randn(4, 3, 64, 64, dtype=torch.float64)).ok
        True
    """
    options.pop("reversible", None)
    args, kwargs = as_call(example_inputs)
    reversible = momentumize(model, gamma, example_inputs=example_inputs, tolerance=tolerance, **options)
    stored = momentumize(model, gamma, example_inputs=example_inputs, tolerance=tolerance, reversible=False, **options)
    _share_velocities(reversible, stored)
    reconstruction = _Reconstruction()
    with _unchanged(model, [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]):
        state = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        seed = torch.seed()
        expected = _run(stored, args, kwargs, seed)
        _load(model, state)
        with observing(reconstruction):
            got = _run(reversible, args, kwargs, seed)
    names = list(expected.gradients)
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    errors = {name: _error([got.gradients[name]], [expected.gradients[name]]) for name in names}
    norms = {name: float(gradient.norm()) for name, gradient in expected.gradients.items()}
    telling = [name for name in names if norms[name] > 1e-6 * max(norms.values())]
    return Verification(
        model=type(model).__name__,
        output_error=_error(got.outputs, expected.outputs),
        gradient_error=_error([got.gradients[name] for name in names], list(expected.gradients.values())),
        gradient_errors=errors,
        reconstruction_error=max(reconstruction.errors.values(), default=0.0),
        saved_bytes=got.saved,
        saved_bytes_stored=expected.saved,
        tolerance=default_tolerance(dtype) if tolerance is None else tolerance,
        worst=max(telling, key=errors.__getitem__, default=""),
    )


class _Reconstruction:
    """Observes each chain's x_0, forward and as reconstructed."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.errors: dict[str, float] = {}

    def __call__(self, chain: str, index: int, x: Tensor, v: Tensor | None) -> None:
        if index == 0 and chain not in self.inputs:
            self.inputs[chain] = x.detach().clone()
        elif index == 0:
            self.errors[chain] = _error([x], [self.inputs[chain]])


def _run(mm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> _Run:
    """One forward and backward; gradients without touching ``.grad``."""
    torch.manual_seed(seed)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs = {
        f"input {index}": leaf.detach().clone().requires_grad_()
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    fresh = [inputs.get(f"input {index}", leaf) for index, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(fresh, spec)
    with torch.enable_grad():
        saved, output = kept_bytes(
            mm, [leaf for leaf in fresh if isinstance(leaf, Tensor)], lambda: mm(*args, **kwargs)
        )
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        weights = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(out.shape, generator=weights).to(out) for out in outputs]
    wanted = {**{name: p for name, p in mm.named_parameters() if p.requires_grad}, **inputs}
    found = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    gradients = {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}
    return _Run([out.detach() for out in outputs], gradients, saved)


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 error over all tensors; absolute where the expected ones are all zero."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, expected, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return difference / norm if norm else difference


def _share_velocities(one: nn.Module, other: nn.Module) -> None:
    """Learned velocities are made anew for each momentumized model; compare with the same ones."""
    if "momentum_velocity" in one._modules:
        other._modules["momentum_velocity"] = one._modules["momentum_velocity"]


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])


@contextlib.contextmanager
def _unchanged(model: nn.Module, tensors: list[Tensor]) -> Iterator[None]:
    """Leave buffers and random generators as they are found."""
    state = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        _load(model, state)
