"""Verify: a momentumized model against the original, reversible against stored, and memory by the allocator.

1. *Original*: the momentumized model at gamma = 0 against the model itself, by the model's own forward and no capture
   (M1): outputs, gradients of all parameters and floating inputs and which of them have one (M15), buffers, and the
   state in which the random generators end (M5).  What a capture loses shows here.
2. *Reversible*: the reversible run at the gamma asked for against the stored run of the same recurrence (M2): outputs,
   gradients, and every state of each chain with the one that the backward reconstructs; the drift detector
   (:mod:`mfx.run.detector`) gives its value.
3. *Memory* (M14): the bytes that the reversible run has alive after its forward, by the allocator, against those that
   saved-tensor hooks count, and what a whole step leaves behind; beside them the time of both runs.

All run from the same weights, buffers and generator state, in the mode the model is in or the one asked for.  The loss
is the caller's, or the sum of all floating outputs with fixed random weights, so every output counts.  Buffers,
gradients, modes and random generators are afterwards as they were before.

At gamma = 0 the first velocity has no influence on any value, so a learned one is left out of the first comparison,
which has nothing to hold its parameters against; the second has them.  A mapping gives each of its patterns 0, so that
the same blocks are rewritten.  With the state in the model's own dtype, gamma = 0 runs the same operations on the same
bits, so outputs and buffers are allowed :data:`mfx.view.runs.EXACTNESS` only, or what the original differs by from
itself when it runs again; under autocast nothing coarser would show an island that was lost.  Gradients that meet are
added in another order, and may differ by ``tolerance``, those of one tensor by ten times as much.

Known limits: the states of all chains are kept for the second comparison, so this takes memory that training does not.
A model that does not repeat itself under one seed (generators of its own, counters in Python) cannot be compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfx.capture import as_call
from mfx.errors import DriftWarning, MfxWarning
from mfx.graph.notes import ADDED
from mfx.memory import settled
from mfx.model import drift, momentumize
from mfx.model.parts import parts_of
from mfx.options import Gamma
from mfx.rule import Schedule
from mfx.rule.arithmetic.precision import default_tolerance
from mfx.run import ChainSpec
from mfx.run.conditions import autocast_dtype
from mfx.run.tape import observing
from mfx.view.runs import Loss, Named, Run, Trial, error, errors, exactness, norm, unchanged
from mfx.view.verified import ChainVerification, Verification

_MEASURED = 3
_ROOM = 4
_OF_RULES = ("rule", "h", "readout")
"""What has no meaning at gamma = 0."""
"""How much further from the original its momentumized version may be than a second run of it."""


def verify(
    model: nn.Module,
    example_inputs: Any,
    gamma: Gamma = 0.9,
    *,
    loss: Loss | None = None,
    train: bool | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Verification:
    """Compare with the original model at gamma = 0, and the reversible run with the stored run, on ``example_inputs``.

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
        A :class:`Verification`, with a verdict for each comparison; its ``ok`` says whether all hold.

    Raises:
        OptionError, InputTypeError, CaptureError: as :func:`mfx.momentumize`.

    Example:
        >>> import torch, torchvision, mfx
        >>> model = torchvision.models.resnet18(weights=None).double()
        >>> mfx.verify(model, torch.randn(4, 3, 64, 64, dtype=torch.float64)).ok
        True
    """
    options.pop("reversible", None)
    options |= {"example_inputs": example_inputs, "tolerance": tolerance}
    trial, states = Trial(model, as_call(example_inputs), loss, torch.initial_seed()), _States()
    allowed = _tolerance(model) if tolerance is None else tolerance
    with unchanged(model, trial, train):
        reversible = momentumize(model, gamma, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MfxWarning)
            stored = momentumize(model, gamma, reversible=False, **options)
            original = _against_original(trial, model, gamma, options, allowed)
        _share_added(reversible, stored)
        expected = trial.run(stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            with observing(states, states.begin):
                got = trial.run(reversible)
            measured = _measured(trial, reversible, stored)
        compared = _compared(reversible, got, expected, states)
    return Verification(model=type(model).__name__, tolerance=allowed, **compared, **original, **measured)


def _against_original(
    trial: Trial, model: nn.Module, gamma: Gamma, options: dict[str, Any], tolerance: float
) -> dict[str, Any]:
    """What the first comparison finds."""
    velocity = options.get("velocity", "zero")
    plain = {key: value for key, value in options.items() if key not in _OF_RULES}
    plain |= {"velocity": "zero" if callable(velocity) else velocity, "state_dtype": "auto"}
    zero = dict.fromkeys(gamma, 0.0) if isinstance(gamma, Mapping) else 0.0
    mm = momentumize(model, zero, **plain)
    expected = trial.first(model)
    got = trial.run(mm)
    outputs, buffers = error(got.outputs, expected.outputs), _largest_error(got.buffers, expected.buffers)
    parts = ((expected.outputs, got.outputs), (expected.gradients, got.gradients), (expected.buffers, got.buffers))
    allowed = min(tolerance, exactness(expected.outputs.values()))
    if not max(outputs, buffers) <= allowed:
        again = trial.run(model)
        repeats = max(error(again.outputs, expected.outputs), _largest_error(again.buffers, expected.buffers))
        allowed = min(tolerance, max(allowed, _ROOM * repeats))
    return {
        "original_output_error": outputs,
        "original_gradient_error": error(got.gradients, expected.gradients),
        "original_gradient_errors": errors(got.gradients, expected.gradients),
        "original_buffer_error": buffers,
        "original_draws_same": all(map(torch.equal, got.generators, expected.generators)),
        "original_unmatched": _unmatched(parts, "original", "momentumized"),
        "original_tolerance": allowed,
    }


def _largest_error(got: Named, expected: Named) -> float:
    return max(errors(got, expected).values(), default=0.0)


def _unmatched(parts: Iterable[tuple[Named, Named]], one: str, other: str) -> dict[str, str]:
    """What only one of two runs gave, and which (M15)."""
    found: dict[str, str] = {}
    for mine, theirs in parts:
        found |= {name: f"{one} only" for name in mine if name not in theirs}
        found |= {name: f"{other} only" for name in theirs if name not in mine}
    return found


def _measured(trial: Trial, reversible: nn.Module, stored: nn.Module) -> dict[str, Any]:
    """Time and bytes of both runs, turn by turn, the best of a few."""
    with settled():
        runs = [(trial.measure(reversible), trial.measure(stored)) for _ in range(_MEASURED)]
    ratio = min(one[0] for one, _ in runs) / min(other[0] for _, other in runs)
    ours, theirs = ([found for pair in runs if (found := pair[side][1]) is not None] for side in (0, 1))
    return {
        "time_ratio": ratio,
        "allocated_bytes": min((found.after_forward for found in ours), default=None),
        "allocated_bytes_stored": min((found.after_forward for found in theirs), default=None),
        "leaked_bytes": min((found.after_backward for found in ours), default=None),
    }


def _tolerance(model: nn.Module) -> float:
    parameter = next(model.parameters(), torch.empty(0))
    return default_tolerance(autocast_dtype(parameter.device, parameter.dtype) or parameter.dtype)


def _compared(mm: nn.Module, got: Run, expected: Run, states: _States) -> dict[str, Any]:
    """What the second comparison finds."""
    common = [name for name in expected.gradients if name in got.gradients]
    found = {name: error({name: got.gradients[name]}, {name: expected.gradients[name]}) for name in common}
    norms = {name: norm(expected.gradients[name]) for name in common}
    telling = [name for name in common if norms[name] > 1e-6 * max(norms.values())]
    ran = [(path, spec) for path, part in parts_of(mm).items() for spec in part.latest() if spec.name in states.plans]
    chains = tuple(_chain(path, spec, got, expected, states, drift(mm)) for path, spec in ran)
    parts = ((expected.outputs, got.outputs), (expected.gradients, got.gradients))
    return {
        "output_error": error(got.outputs, expected.outputs),
        "gradient_error": error(got.gradients, expected.gradients),
        "gradient_errors": found,
        "unmatched": _unmatched(parts, "stored", "reversible"),
        "reconstruction_error": max((max(chain.reconstruction, default=0.0) for chain in chains), default=0.0),
        "saved_bytes": got.saved,
        "saved_bytes_stored": expected.saved,
        "predicted_bytes": got.held,
        "worst": max(telling, key=found.__getitem__, default=""),
        "chains": chains,
    }


def _chain(
    path: str, spec: ChainSpec, got: Run, expected: Run, states: _States, drifts: dict[str, float]
) -> ChainVerification:
    owned = [".".join(filter(None, (path, *names))) for step in spec.steps for ((*names,), *_) in step.parameters]
    known = {name: expected.gradients[name] for name in dict.fromkeys(owned) if name in expected.gradients}
    plan = states.plans[spec.name]
    return ChainVerification(
        name=spec.name,
        blocks=tuple(step.name for step in spec.steps),
        gradient_error=error(got.gradients, known),
        reconstruction=tuple(error for _, error in sorted(states.errors[spec.name].items())),
        drift=drifts.get(spec.name),
        bound=plan.drift,
        schedule=plan.note(spec.tail),
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
            self.errors[chain][index] = error({"x": x}, {"x": self.forward.pop((chain, index))})

    def begin(self, chain: str, plan: Schedule) -> None:
        """Note the plan of a chain that starts."""
        self.plans[chain], self.errors[chain] = plan, {}


def _share_added(one: nn.Module, other: nn.Module) -> None:
    """What gives velocities and gammas is made anew for each momentumized model; compare with the same."""
    other._modules.update({name: one._modules[name] for name in ADDED if name in one._modules})
