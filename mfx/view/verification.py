"""Verify: the reversible run against the stored run of the same recurrence, on the caller's own data and loss.

1. Both run from the same weights, buffers and generator state, in the mode the model is in or the one asked for.
2. The loss is the caller's, or the sum of all floating outputs with fixed random weights, so every output counts.
3. Compared are outputs, gradients of all parameters and floating inputs, every state of each chain with the one
   that the backward reconstructs, bytes and time; the drift detector (:mod:`mfx.run.detector`) gives its value.

Buffers, gradients, modes and random generators are afterwards as they were before.
Known limits: the states of all chains are kept for the comparison, so this takes memory that training does not.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.capture import as_call
from mfx.errors import DriftWarning, InputTypeError
from mfx.graph.notes import ADDED
from mfx.memory import kept_bytes
from mfx.model import drift, momentumize
from mfx.model.parts import parts_of
from mfx.options import Gamma
from mfx.rule import Schedule
from mfx.rule.precision import default_tolerance
from mfx.run import ChainSpec
from mfx.run.conditions import autocast_dtype
from mfx.run.tape import observing
from mfx.torch_versions import pytree
from mfx.view.verified import ChainVerification, Verification

_TIMED = 2


@dataclass
class _Run:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    saved: int
    seconds: float


def verify(
    model: nn.Module,
    example_inputs: Any,
    gamma: Gamma = 0.9,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    train: bool | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Verification:
    """Compare the reversible run with the stored run of the same recurrence on ``example_inputs``.

    Args:
        model: the original model; in train mode dropout and BatchNorm are alive in the comparison.
        example_inputs: tensor, tuple or dict, as the model's forward takes them.
        gamma: as for :func:`mfx.momentumize`.
        loss: maps the model's output to a scalar; None weights all floating outputs with fixed random numbers.
        train: True or False puts all modules into that mode meanwhile; None leaves them as they are.
        tolerance: relative error allowed; None is 1e-10 for float64 parameters, 1e-4 for float32, 1e-2 below and
            under autocast.
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
    call = as_call(example_inputs)
    args, kwargs = call.args, call.kwargs
    tensors = call.tensors
    states = _States()
    with _unchanged(model, tensors, train):
        options |= {"example_inputs": example_inputs, "tolerance": tolerance}
        reversible = momentumize(model, gamma, **options)
        stored = momentumize(model, gamma, reversible=False, **options)
        _share_velocities(reversible, stored)
        state = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

        def once(mm: nn.Module) -> _Run:
            _load(model, state)
            return _run(mm, args, kwargs, seed, loss)

        seed = torch.seed()
        expected = once(stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            with observing(states, states.begin):
                got = once(reversible)
            runs = [(once(reversible).seconds, once(stored).seconds) for _ in range(_TIMED)]
    ratio = min(one for one, _ in runs) / min(other for _, other in runs)
    return _compare(model, reversible, got, expected, states, tolerance, ratio)


def _compare(
    model: nn.Module,
    mm: nn.Module,
    got: _Run,
    expected: _Run,
    states: _States,
    tolerance: float | None,
    time_ratio: float,
) -> Verification:
    names = list(expected.gradients)
    errors = {name: _error([got.gradients[name]], [expected.gradients[name]]) for name in names}
    norms = {name: float(gradient.norm()) for name, gradient in expected.gradients.items()}
    telling = [name for name in names if norms[name] > 1e-6 * max(norms.values())]
    ran = [spec for part in parts_of(mm).values() for spec in part.latest() if spec.name in states.plans]
    chains = tuple(_chain(spec, got, expected, states, drift(mm)) for spec in ran)
    parameter = next(model.parameters(), torch.empty(0))
    compute = autocast_dtype(parameter.device, parameter.dtype) or parameter.dtype
    return Verification(
        model=type(model).__name__,
        output_error=_error(got.outputs, expected.outputs),
        gradient_error=_error([got.gradients[name] for name in names], list(expected.gradients.values())),
        gradient_errors=errors,
        reconstruction_error=max((max(chain.reconstruction, default=0.0) for chain in chains), default=0.0),
        saved_bytes=got.saved,
        saved_bytes_stored=expected.saved,
        tolerance=default_tolerance(compute) if tolerance is None else tolerance,
        worst=max(telling, key=errors.__getitem__, default=""),
        time_ratio=time_ratio,
        chains=chains,
    )


def _chain(spec: ChainSpec, got: _Run, expected: _Run, states: _States, drifts: dict[str, float]) -> ChainVerification:
    owned = [".".join(filter(None, names)) for step in spec.steps for ((*names,), *_) in step.parameters]
    known = [name for name in dict.fromkeys(owned) if name in expected.gradients]
    plan = states.plans[spec.name]
    return ChainVerification(
        name=spec.name,
        blocks=tuple(step.name for step in spec.steps),
        gradient_error=_error([got.gradients[name] for name in known], [expected.gradients[name] for name in known]),
        reconstruction=tuple(error for _, error in sorted(states.errors[spec.name].items())),
        drift=drifts.get(spec.name),
        bound=plan.drift,
        schedule=plan.note(len(spec.steps)),
    )


class _States:
    """Observes each chain's states in forward, and the errors of those that its backward reconstructs."""

    def __init__(self) -> None:
        self.plans: dict[str, Schedule] = {}
        self.forward: dict[tuple[str, int], Tensor] = {}
        self.errors: dict[str, dict[int, float]] = {}

    def __call__(self, chain: str, index: int, x: Tensor, v: Tensor | None) -> None:
        if (chain, index) not in self.forward:
            self.forward[chain, index] = x.detach().clone()
        else:
            self.errors[chain][index] = _error([x], [self.forward.pop((chain, index))])

    def begin(self, chain: str, plan: Schedule) -> None:
        """Note the plan of a chain that starts."""
        self.plans[chain], self.errors[chain] = plan, {}


def _run(
    mm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int, loss: Callable[[Any], Tensor] | None
) -> _Run:
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
    tensors = [leaf for leaf in fresh if isinstance(leaf, Tensor)]
    start = _now(tensors)
    with torch.enable_grad():
        saved, output = kept_bytes(mm, tensors, lambda: mm(*args, **kwargs))
        outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        ends, cotangents = _ends(output, outputs, loss)
    wanted = {**{name: p for name, p in mm.named_parameters() if p.requires_grad}, **inputs}
    found = torch.autograd.grad(ends, list(wanted.values()), cotangents, allow_unused=True)
    seconds = _now(tensors) - start
    gradients = {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}
    return _Run([out.detach() for out in outputs], gradients, saved, seconds)


def _ends(
    output: Any, outputs: list[Tensor], loss: Callable[[Any], Tensor] | None
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Where the backward starts, and with which gradients."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InputTypeError(f"loss must give a tensor with one element, not {value!r:.80}")
        return [value], None
    weights = torch.Generator().manual_seed(0)
    return outputs, [torch.randn(out.shape, generator=weights).to(out) for out in outputs]


def _now(tensors: list[Tensor]) -> float:
    for device in {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}:
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 error over all tensors; absolute where the expected ones are all zero."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, expected, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    norm = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return difference / norm if norm else difference


def _share_velocities(one: nn.Module, other: nn.Module) -> None:
    """Learned velocities are made anew for each momentumized model; compare with the same ones."""
    if ADDED in one._modules:
        other._modules[ADDED] = one._modules[ADDED]


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])


@contextlib.contextmanager
def _unchanged(model: nn.Module, tensors: list[Tensor], train: bool | None) -> Iterator[None]:
    """Leave buffers, modes and random generators as they are found."""
    state = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    try:
        if train is not None:
            model.train(train)
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        _load(model, state)
