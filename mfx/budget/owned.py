"""Owned: what a training step has alive beside activations: parameters, gradients, buffers, an optimizer's state.

1. Tensors are counted by the memory that they hold, shared memory once; gradients are as large as what they are of.
2. The optimizer takes two steps on fake tensors, as its own code does: after the first its state is there and is
   counted, the second shows what a step needs for itself.

An optimizer that is made already gives its settings and groups, and is left as it is.  On devices where torch would
update all parameters in one operation (``foreach``), so does the fake step, since that needs a copy of them at times.

Known limits: values that an update looks at are halves here, but for counters, which are known; an optimizer whose
``step`` needs a closure (LBFGS), or gradients that are sparse, cannot be asked.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.budget.live import LiveBytes
from mfx.errors import OptionError
from mfx.graph.shapes import Fake
from mfx.memory import values_of
from mfx.options import Optimizer
from mfx.torch_versions import DataDependentOutputException, TorchDispatchMode, pytree

_FOREACH = ("cuda", "xpu")
"""Devices on which torch's optimizers update all parameters in one operation."""


@dataclass(frozen=True)
class Owned:
    """Bytes: ``state`` is the optimizer's (None where none was named), ``updating`` what its step needs for itself."""

    parameters: int
    gradients: int
    buffers: int
    state: int | None = None
    updating: int = 0


def owned_by(model: nn.Module, optimizer: Optimizer = None) -> Owned:
    """What ``model`` and ``optimizer`` (see :func:`mfx.options.check_optimizer`) hold.

    Raises:
        OptionError: the optimizer cannot be made of the model's parameters, or cannot take a step.

    Example:
        >>> owned_by(nn.Linear(8, 8, bias=False), torch.optim.SGD), owned_by(nn.Linear(8, 8), torch.optim.Adam).state
        (Owned(parameters=256, gradients=256, buffers=0, state=0, updating=0), 584)
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = (bytes_of(model.parameters()), bytes_of(trained), bytes_of(model.buffers()))
    return Owned(*held) if optimizer is None else Owned(*held, *_stepped(model, optimizer))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of the distinct storages of some tensors."""
    storages = {storage._cdata: storage for storage in (values_of(tensor).untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def optimizer_of(optimizer: Optimizer, model: nn.Module) -> Callable[[], Any] | None:
    """A step of an optimizer, of its own state, on the parameters of ``model``."""
    if optimizer is None:
        return None
    made = _made(optimizer, {id(parameter): parameter for parameter in model.parameters()})
    return functools.partial(type(made).step, made)


def _stepped(model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
    """The bytes of an optimizer's state, and those that its step has alive for itself."""
    originals = list(model.parameters())
    fake = Fake(model, [])
    with fake():
        twins = dict(zip(map(id, originals), model.parameters(), strict=True))
        try:
            made = _made(optimizer, twins)
            for parameter in twins.values():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            step = functools.partial(type(made).step, made)
            with _Halves():
                step()
                with LiveBytes() as live:
                    step()
        except OptionError:
            raise
        except Exception as error:
            raise OptionError(
                f"optimizer={_name(optimizer)} cannot take a step on the parameters of {type(model).__name__}: "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Give a callable that makes one of "
                "parameters, such as lambda parameters: torch.optim.SGD(parameters, momentum=0.9), or leave it out "
                "and add its state yourself"
            ) from error
        state = bytes_of(leaf for leaf in pytree.tree_leaves(list(made.state.values())) if isinstance(leaf, Tensor))
    return state, live.peak


def _made(optimizer: Any, twins: Mapping[int, Tensor]) -> torch.optim.Optimizer:
    """The optimizer of the fake parameters."""
    if isinstance(optimizer, torch.optim.Optimizer):
        made = _twin(optimizer, twins)
    else:
        made = optimizer(list(twins.values()))
        if not isinstance(made, torch.optim.Optimizer):
            raise OptionError(f"optimizer={_name(optimizer)} gave {type(made).__name__}, not a torch.optim.Optimizer")
    known = {id(twin) for twin in twins.values()}
    if any(id(parameter) not in known for group in made.param_groups for parameter in group["params"]):
        raise OptionError(
            f"optimizer={_name(optimizer)} holds parameters that are not the model's: make it of the parameters that "
            "it is given"
        )
    for group in made.param_groups:  # fakes are not of the class that torch has these for of itself
        on = {parameter.device.type for parameter in group["params"]}
        if "foreach" in group and group["foreach"] is None and not group.get("fused") and on <= set(_FOREACH):
            group["foreach"] = True
    return made


def _twin(optimizer: torch.optim.Optimizer, twins: Mapping[int, Tensor]) -> torch.optim.Optimizer:
    """``optimizer`` with the fake parameters in place of its own, without its state and hooks."""
    twin = object.__new__(type(optimizer))
    hooks = {name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")}
    groups = [
        {**group, "params": [twins.get(id(parameter), parameter) for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    twin.__dict__.update({**vars(optimizer), **hooks, "state": defaultdict(dict), "param_groups": groups})
    return twin


def _name(optimizer: Any) -> str:
    return getattr(optimizer, "__name__", None) or type(optimizer).__name__


class _Halves(TorchDispatchMode):
    """Answers whoever asks a fake tensor for a value that it does not know: no size depends on it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func.name() != "aten::_local_scalar_dense":
                raise
            return 0.5 if args[0].is_floating_point() else 1
