"""Runs: one forward and backward of a model from a fixed start, and all of it that another run can be held against.

1. A :class:`Trial` holds what the runs have in common: the call, the loss, and the buffers and the seed that each run
   starts from.
2. :meth:`Trial.run` gives a :class:`Run`: outputs, gradients, buffers and generators as they end, bytes kept.
3. :meth:`Trial.measure` gives time, and bytes by the allocator, of a run that nothing observes.

Gradients are taken without touching ``.grad``.
Known limits: state of a model outside of parameters and buffers (Python attributes, generators of its own) is neither
reset between runs nor put back.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mfx.capture import Call
from mfx.errors import InputTypeError
from mfx.memory import KeptBytes, StepBytes, step_bytes, values_of
from mfx.torch_versions import pytree

Named = dict[str, Tensor]
Loss = Callable[[Any], Tensor]

_SMALL = 1e-3
"""A tensor whose norm is a smaller share of its group's is compared on that scale: it may be rounding noise alone."""


EXACTNESS = {torch.float64: 1e-10}
"""How near two runs of the same operations on the same bits must be, by dtype; 1e-5 for all others."""


@dataclass(frozen=True, eq=False)
class Run:
    """What one run gave: ``outputs`` by place in the model's output, ``gradients`` where there is one, by name.

    ``saved`` are the bytes kept for backward, ``held`` those and the outputs'.
    """

    outputs: Named
    gradients: Named
    buffers: Named
    generators: tuple[Tensor, ...]
    saved: int
    held: int


class Trial:
    """What all runs have in common.

    Args:
        model: the original; the models that are run share its parameters, and its buffers by name.
        call: the inputs.
        loss: maps the output to a scalar; None weights all floating outputs with fixed random numbers.
        seed: of the random generators, at the start of each run.
    """

    def __init__(self, model: nn.Module, call: Call, loss: Loss | None, seed: int) -> None:
        self.call = call
        self.loss = loss
        self.seed = seed
        tensors = [*model.parameters(), *model.buffers(), *call.tensors]
        self.device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self.devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
        self.state = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
        self.asking = True

    def first(self, model: nn.Module) -> Run:
        """The original's run.  Where it takes no inputs that ask for a gradient, they do not from then on."""
        try:
            return self.run(model)
        except RuntimeError:
            self.asking = False
            return self.run(model)

    def reset(self, mm: nn.Module) -> None:
        """Give a model the buffers of the start, objects and values."""
        with torch.no_grad():
            for name, (buffer, value) in self.state.items():
                owner, _, own = name.rpartition(".")
                mm.get_submodule(owner)._buffers[own] = buffer
                buffer.copy_(value)

    def run(self, mm: nn.Module) -> Run:
        """One forward and backward of ``mm``."""
        inputs, args, kwargs = self._start(mm)
        with torch.enable_grad(), KeptBytes([*mm.parameters(), *mm.buffers(), *args_tensors(args, kwargs)]) as kept:
            output = mm(*args, **kwargs)
        outputs = _by_place(output)
        saved, held = kept.total(), kept.total(outputs.values())
        gradients = self._gradients(mm, inputs, output)
        buffers = {name: buffer.detach().clone() for name, buffer in mm.named_buffers()}
        values = {name: value.detach() for name, value in outputs.items()}
        return Run(values, gradients, buffers, self._generators(), saved, held)

    def measure(self, mm: nn.Module) -> tuple[float, StepBytes | None]:
        """Seconds of one forward and backward of ``mm``, and its bytes by the allocator."""
        inputs, args, kwargs = self._start(mm)
        seconds = 0.0

        def timed(run: Callable[[], Any]) -> Any:
            nonlocal seconds
            start = self._now()
            result = run()
            seconds += self._now() - start
            return result

        with torch.enable_grad():
            found = step_bytes(
                lambda: timed(lambda: mm(*args, **kwargs)),
                lambda output: timed(lambda: self._gradients(mm, inputs, output)),
                self.device,
            )
        return seconds, found

    def _start(self, mm: nn.Module) -> tuple[Named, tuple[Any, ...], dict[str, Any]]:
        """Reset buffers and generators; gives fresh inputs, those that ask for a gradient also by name."""
        self.reset(mm)
        random.seed(self.seed)
        torch.manual_seed(self.seed)
        fresh = [
            leaf.detach().clone().requires_grad_(self.asking)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
            for leaf in self.call.leaves
        ]
        args, kwargs = pytree.tree_unflatten(fresh, self.call.spec)
        named = {f"input {index}": leaf for index, leaf in enumerate(fresh) if isinstance(leaf, Tensor)}
        return {name: leaf for name, leaf in named.items() if leaf.requires_grad and self.asking}, args, kwargs

    def _gradients(self, mm: nn.Module, inputs: Named, output: Any) -> Named:
        with torch.enable_grad():
            ends, cotangents = _ends(output, self.loss)
        wanted = {**{name: p for name, p in mm.named_parameters() if p.requires_grad}, **inputs}
        if not ends or not wanted:
            return {}
        # What is unused has no entry; which entries there are is compared (M15).
        found = torch.autograd.grad(ends, list(wanted.values()), cotangents, allow_unused=True)
        return {name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None}

    def _generators(self) -> tuple[Tensor, ...]:
        return (torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self.devices))

    def _now(self) -> float:
        if self.device.type not in ("cpu", "meta"):
            torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()


def args_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _by_place(output: Any) -> Named:
    """The tensors of an output, by their place in it; also those in attributes of objects (a cache, a distribution).

    Of a jagged tensor, its values.
    """
    found: Named = {}
    seen: set[int] = set()
    waiting = [("output", output)]
    while waiting:
        place, value = waiting.pop(0)
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            inner = f"{place}{pytree.keystr(path)}"
            if isinstance(leaf, Tensor):
                found[inner] = values_of(leaf)
            elif isinstance(getattr(leaf, "__dict__", None), dict) and not _is_code(leaf) and id(leaf) not in seen:
                seen.add(id(leaf))
                waiting.append((f"{inner}.", vars(leaf)))
    return found


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, ModuleType)


def _ends(output: Any, loss: Loss | None) -> tuple[list[Tensor], list[Tensor] | None]:
    """Where the backward starts, and with which gradients."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise InputTypeError(f"loss must give a tensor with one element, not {value!r:.80}")
        return [value], None
    weights = torch.Generator().manual_seed(0)
    floating = [value for value in _by_place(output).values() if value.is_floating_point()]
    pairs = [(value, torch.randn(value.shape, generator=weights).to(value)) for value in floating]
    kept = [(value, weight) for value, weight in pairs if value.requires_grad]
    return [value for value, _ in kept], [weight for _, weight in kept]


def error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative L2 error over the tensors that both have; absolute where the expected ones are all zero."""
    names = [name for name in expected if name in got]
    difference = sum(_distance(got[name], expected[name]) ** 2 for name in names) ** 0.5
    whole = sum(norm(expected[name]) ** 2 for name in names) ** 0.5
    return difference / whole if whole else difference


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each tensor, relative to its own norm, or to a thousandth of that of all where it is smaller."""
    floor = _SMALL * sum(norm(value) ** 2 for value in expected.values() if value.is_floating_point()) ** 0.5
    scales = {name: max(norm(value), floor) for name, value in expected.items() if name in got}
    found = {name: _distance(got[name], expected[name]) for name in scales}
    return {name: found[name] / scale if scale else found[name] for name, scale in scales.items()}


def exactness(values: Iterable[Tensor]) -> float:
    """The :data:`EXACTNESS` of the finest of some values."""
    return min((EXACTNESS.get(value.dtype, 1e-5) for value in values), default=1e-5)


def norm(value: Tensor) -> float:
    """The L2 norm of what is finite."""
    return float(values_of(value.detach()).double().nan_to_num(0.0, 0.0, 0.0).norm())


def _distance(got: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference, in which equal infinities (masks) differ by nothing; infinite for other shapes."""
    got, expected = values_of(got), values_of(expected)
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(got, expected) else float("inf")
    return float(torch.where(got == expected, 0.0, (got - expected).abs().double()).norm())


@contextlib.contextmanager
def unchanged(model: nn.Module, trial: Trial, train: bool | None) -> Iterator[None]:
    """Leave buffers, modes and random generators as they are found."""
    modes = [(module, module.training) for module in model.modules()]
    python = random.getstate()
    try:
        if train is not None:
            model.train(train)
        with torch.random.fork_rng(devices=trial.devices):
            yield
    finally:
        random.setstate(python)
        for module, mode in modes:
            module.training = mode
        trial.reset(model)
