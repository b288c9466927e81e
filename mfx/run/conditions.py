"""Conditions: what a branch ran under, so that it can run a second time without a second side effect.

Recorded when a branch first runs, restored around its recomputation (M5, M6):

1. the random generators' states, where the branch drew from them;
2. autocast: device, dtype, enabled.  Its weight cache stays off in both runs: a cast cached without gradient
   would be handed to code outside the chain, which would lose the weight's gradient in silence;
3. the training flags of the branch's modules, which may have been changed since;
4. buffers.  torch's normalization layers in train mode use the batch's own statistics and get none to move a
   second time.  Any other buffer that the branch writes to is put back to the value from before the branch; all
   others must not have changed since (M8).

Known limits: state kept outside of buffers (Python attributes, generators of a module's own) is not seen.
Source: torch/utils/checkpoint.py, whose rules for generators and autocast these follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mfx.errors import BackwardError
from mfx.memory import values_of
from mfx.torch_versions import FakeTensor, FunctionalTensor, NormBase

_NORMS = (nn.modules.batchnorm.__name__, nn.modules.instancenorm.__name__)
_written_buffers: WeakKeyDictionary[nn.Module, dict[tuple[bool, str], bool]] = WeakKeyDictionary()
"""Of modules that have run: whether a branch writes to the buffer of this name, by training flag."""


@dataclass(frozen=True)
class Autocast:
    """The autocast state of one forward: (device type, enabled, dtype) for each device in use."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def current(device: torch.device) -> Autocast:
        """The state in force now, for the CPU and ``device``."""
        types = [kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind)]
        states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in types]
        return Autocast(tuple(states))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Put this state in force, without the weight cache."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that autocast, if in force, has branches on inputs of ``dtype`` compute in; it spares float64."""
    kind = device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts and dtype != torch.float64 else None


@dataclass
class Conditions:
    """The conditions under which one branch ran: what :meth:`restored` brings back."""

    block: str
    modules: tuple[nn.Module, ...]
    own_buffers: tuple[tuple[nn.Module, str], ...]
    flags: tuple[bool, ...]
    draws: bool
    device: torch.device
    generators: tuple[torch.Tensor, ...] | None = None
    kept: list[tuple[nn.Module, str, torch.Tensor]] = field(default_factory=list)
    fixed: list[tuple[nn.Module, str, torch.Tensor, int]] = field(default_factory=list)

    @staticmethod
    def of(
        block: str,
        modules: tuple[nn.Module, ...],
        buffers: tuple[tuple[nn.Module, str], ...],
        draws: bool,
        like: torch.Tensor,
    ) -> Conditions:
        """The conditions for running ``block`` now, with the modules it calls and the buffers it reads."""
        flags = tuple(module.training for module in modules)
        return Conditions(block, modules, buffers, flags, draws and not is_symbolic(like), like.device)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the first run."""
        buffers = list(self._buffers())
        for module, name, buffer in buffers:
            if _known_written(module, name) is not False:
                self.kept.append((module, name, buffer.detach().clone()))
        versions = [buffer._version for _, _, buffer in buffers]
        before = _generator_states(self.device) if self.draws else None
        yield
        if before is not None and not _same_states(before, _generator_states(self.device)):
            self.generators = before
        self._sort_buffers(buffers, versions)

    @contextlib.contextmanager
    def restored(self, copies: bool = False) -> Iterator[None]:
        """Around the whole recomputation: modes and buffers as they were.

        Normalization layers that need no buffers have none, or ``copies`` where the same must be saved as before.
        """
        self._refuse_changes()
        now = tuple(module.training for module in self.modules)
        swapped: list[tuple[nn.Module, str, torch.Tensor | None]] = []
        try:
            for module, flag in zip(self.modules, self.flags, strict=True):
                if module.training is not flag:
                    module.training = flag
                if flag and _runs_without_buffers(module):
                    swapped += [(module, name, buffer) for name, buffer in module._buffers.items()]
                    own = module._buffers.items()
                    module._buffers.update({name: b.clone() if copies and b is not None else None for name, b in own})
            for module, name, value in self.kept:
                swapped.append((module, name, module._buffers[name]))
                module._buffers[name] = value.clone()
            yield
        finally:
            for module, name, buffer in reversed(swapped):
                module._buffers[name] = buffer
            for module, flag in zip(self.modules, now, strict=True):
                if module.training is not flag:
                    module.training = flag

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Around the branch's own run: the random generators as they were."""
        if self.generators is None:
            yield
            return
        now = _generator_states(self.device)
        _set_generator_states(self.device, self.generators)
        try:
            yield
        finally:
            _set_generator_states(self.device, now)

    def _buffers(self) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
        """The buffers that the branch may read."""
        for module, training in zip(self.modules, self.flags, strict=True):
            if module._buffers and not (training and _runs_without_buffers(module)):
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        yield module, name, buffer
        for module, name in self.own_buffers:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield module, name, buffer

    def _sort_buffers(self, buffers: list[tuple[nn.Module, str, torch.Tensor]], versions: list[int]) -> None:
        """Tell the buffers that the branch wrote to from those that must stay as they are."""
        values = {(module, name): value for module, name, value in self.kept}
        for (module, name, buffer), version in zip(buffers, versions, strict=True):
            value = values.pop((module, name), None)
            written = _was_written(module, name, buffer, version, value)
            if written and value is None:
                raise BackwardError(
                    f"block {self.block!r}: {type(module).__name__} wrote to its buffer {name!r}, which it did "
                    "not do when it first ran, so the value from before is lost and the branch cannot be "
                    f"recomputed. Keep the block as it is with exclude={self.block!r}"
                )
            if written and value is not None:
                values[module, name] = value
            else:
                self.fixed.append((module, name, buffer, version))
            if not is_symbolic(buffer):
                _written_buffers.setdefault(module, {})[module.training, name] = written
        self.kept = [(module, name, value) for (module, name), value in values.items()]

    def _refuse_changes(self) -> None:
        for module, name, buffer, version in self.fixed:
            if module._buffers.get(name) is not buffer or buffer._version != version:
                raise BackwardError(
                    f"block {self.block!r}: buffer {name!r} of {type(module).__name__} was changed between "
                    "forward and backward, so its branch cannot be recomputed as it ran. Change buffers after "
                    "backward, or use reversible=False"
                )


def _known_written(module: nn.Module, name: str) -> bool | None:
    """Whether the module's buffer is written to in the mode the module is in; None where it has not run yet."""
    return _written_buffers.get(module, {}).get((module.training, name))


def _was_written(module: nn.Module, name: str, buffer: torch.Tensor, version: int, value: torch.Tensor | None) -> bool:
    """Whether a run wrote to a buffer that had this version, and this value where a copy was kept.

    Values are compared at a module's first run only: F.batch_norm moves no version counter.
    """
    if module._buffers[name] is not buffer or buffer._version != version or _known_written(module, name):
        return True
    return value is not None and not is_symbolic(buffer) and not torch.equal(value, buffer)


def compiling(x: torch.Tensor) -> bool:
    """Whether what runs is traced to be compiled."""
    return torch.compiler.is_compiling() or isinstance(x, FunctionalTensor)


def is_symbolic(tensor: torch.Tensor | None) -> bool:
    """Whether there is no value behind a tensor: a compiler traces, or shapes alone are asked for."""
    if tensor is None:
        return False
    return isinstance(values_of(tensor), (FakeTensor, FunctionalTensor)) or tensor.is_meta


def _runs_without_buffers(module: nn.Module) -> bool:
    """Whether the module is a normalization layer that needs none of its buffers in train mode.

    torch's own are; a subclass with a forward of its own may want them, and SyncBatchNorm counts its batches.
    """
    own = type(module).__module__ in _NORMS
    return own and isinstance(module, NormBase) and not isinstance(module, nn.SyncBatchNorm)


def _generator_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    states = (torch.get_rng_state(),)
    if device.type == "cpu":
        return states
    return (*states, torch.get_device_module(device).get_rng_state(device))


def _set_generator_states(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


def _same_states(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
