"""Sharding: modules that torch.distributed runs code of its own around, and the parameters that FSDP2 holds of them.

``fully_shard`` (FSDP2), ``parallelize_module`` and the like work by hooks on a module's call.  So

1. a captured graph calls such a module, and does not run what is inside of it by itself (:func:`is_distributed`);
2. what FSDP2 shards is a *unit*.  Its parameters are whole while its module runs, and only then: the sharded parameter
   that the module holds before and after computes nothing, so no gradient could reach it through the graph of a branch.
   A step therefore takes none of them as operands.  Its backward calls the module again, with gradients: hooks gather
   the parameters, and when the branch is differentiated by what it computed with, they reduce the gradients into the
   sharded parameters' ``.grad`` and free the rest (:meth:`Units.gathered`).

Reference: torch/distributed/fsdp/_fully_shard/_fsdp_state.py, _fsdp_param_group.py.
Known limits: what exchanges the parameters themselves is refused: FSDP1 (``FullyShardedDataParallel``) around modules
inside of a captured one, and DeepSpeed's ZeRO-3.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError, CaptureError, CompileError
from mfx.torch_versions import fsdp_as_in_forward, fsdp_parameters, fsdp_places, fsdp_state, fsdp_states

ANCHOR = torch.empty(0, requires_grad=True)
"""A leaf that stands for the parameters of all units: a backward comes to it, unless it is asked for the gradients of
some tensors only, and then no unit may accumulate any."""

COMPILE_BLOCKS = (
    "Compile the blocks in place instead of the model (for block in blocks: block.compile()), before or after "
    "fully_shard and mfx.momentumize"
)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_distributed_hook(hook: Callable[..., Any]) -> bool:
    """Whether a hook is one of torch.distributed's own."""
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return f"{module}.".startswith("torch.distributed.")


def is_distributed(module: nn.Module) -> bool:
    """Whether torch.distributed runs code of its own around the calls of a module."""
    return any(is_distributed_hook(hook) for name in _HOOKS for hook in module.__dict__.get(name, {}).values())


def refuse_wrapped(model: nn.Module, name: str = "") -> None:
    """Raise where FSDP1 wraps ``model``, which stands at the path ``name``, or something inside of it.

    Raises:
        CaptureError: names the module, and what does instead.
    """
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.distributed.fsdp.fully_sharded"):
            at = ".".join(filter(None, (name, path))) or "the model"
            raise CaptureError(
                f"{at} is wrapped by FullyShardedDataParallel (FSDP1), which puts other parameters in place while its "
                "module runs, so that steps which run it again in backward would lose their gradients. Use "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead, before or after mfx.momentumize, or wrap nothing "
                "but the whole momentumized model"
            )


def refuse_partitioned(block: str, tensor: Tensor) -> None:
    """Raise for a parameter that DeepSpeed's ZeRO-3 has partitioned.

    Source: deepspeed/runtime/zero/partition_parameters.py, whose ``is_zero_param`` asks for this attribute.

    Raises:
        BackwardError: names the block, and what does instead.
    """
    if hasattr(tensor, "ds_id"):
        raise BackwardError(
            f"block {block!r}: its parameters are partitioned by DeepSpeed (ZeRO stage 3), whose hooks fill and empty "
            "them around each module, and expect no second run in backward. Use ZeRO stage 1 or 2, or "
            "torch.distributed.fsdp.fully_shard (FSDP2), or reversible=False"
        )


def refuse_compiled(model: nn.Module, name: str) -> None:
    """Raise where FSDP2 shards something inside of ``model``, which is named so and about to be compiled whole.

    Raises:
        CompileError: names what is sharded, and what does instead.
    """
    units = [path for path, module in model.named_modules() if path and Units.of([module]) is not None]
    if units:
        shown = ", ".join(units[:3]) + (f" and {len(units) - 3} more" if len(units) > 3 else "")
        raise CompileError(
            f"{name} is momentumized, and fully_shard shards parts of it ({shown}) by hooks that torch.compile does "
            "not follow: its graph would end at each of them, and each part of a chain would start anew. "
            f"{COMPILE_BLOCKS}, or run the model as it is; what is sharded as one can be compiled whole"
        )


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Run modules of ``model`` as if FSDP2 sharded none of them: none of its hooks run."""
    tables = [(m.__dict__, name) for m in model.modules() if fsdp_state(m) is not None for name in _HOOKS]
    before = [(table, name, table[name]) for table, name in tables]
    try:
        for table, name, hooks in before:
            others = ((key, hook) for key, hook in hooks.items() if not is_distributed_hook(hook))
            table[name] = OrderedDict(others)
        yield
    finally:
        for table, name, hooks in before:
            table[name] = hooks


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """With parameters in the place of those that are sharded now, of their whole shape, without values or memory."""
    held = _sharded_now(model)
    try:
        for table, name, sharded in held:
            blank = torch.empty((), dtype=sharded.dtype, device=sharded.device).expand(sharded.shape)
            table[name] = nn.Parameter(blank, sharded.requires_grad)
        yield
    finally:
        for table, name, sharded in held:
            table[name] = sharded


def sharded_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters of ``model`` that FSDP2 shards and has not gathered now; some may be units of what holds it."""
    return [sharded for _, _, sharded in _sharded_now(model)]


def _sharded_now(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """The same, where they are held."""
    every = [parameter for state in fsdp_states() for parameter in fsdp_parameters(state)]
    tables = {id(module._parameters): module._parameters for module in model.modules()} if every else {}
    places = [(id(module._parameters), name, one) for one in every for module, name in fsdp_places(one)]
    found = [(tables[key], name, one.sharded_param) for key, name, one in places if key in tables]
    return [(table, name, sharded) for table, name, sharded in found if table.get(name) is sharded]


def casting(modules: Iterable[nn.Module]) -> torch.dtype | None:
    """The coarsest dtype that the mixed precision of units among ``modules`` computes in, if it casts."""
    states = [state for module in modules if (state := fsdp_state(module)) is not None]
    return coarsest(parameter.mp_policy.param_dtype for state in states for parameter in fsdp_parameters(state))


def coarsest(dtypes: Iterable[torch.dtype | None]) -> torch.dtype | None:
    """Of several dtypes; None where there is none."""
    known = [dtype for dtype in dtypes if dtype is not None]
    return max(known, key=lambda dtype: torch.finfo(dtype).eps, default=None)


@dataclass(frozen=True, eq=False)
class Units:
    """What FSDP2 shards among some modules: the ``modules`` of its own, and their ``parameters``, as torch has them.

    ``places`` are those of the parameters in modules; ``versions`` how often each had been written to.
    """

    modules: tuple[Any, ...]
    parameters: tuple[Any, ...]
    places: frozenset[tuple[int, str]]
    versions: tuple[int, ...]

    @staticmethod
    def of(modules: Iterable[nn.Module]) -> Units | None:
        """The units among ``modules`` whose hooks run; None where there is none."""
        sharded = [module for module in modules if fsdp_state(module) is not None and is_distributed(module)]
        if not sharded:
            return None
        found = {id(state): (state, module) for module in sharded if (state := fsdp_state(module))}
        parameters = tuple(parameter for state, _ in found.values() for parameter in fsdp_parameters(state))
        places = ((id(module._parameters), name) for one in parameters for module, name in fsdp_places(one))
        own = tuple(module for _, module in found.values())
        return Units(own, parameters, frozenset(places), _versions(parameters))

    def hold(self, module: nn.Module, name: str) -> bool:
        """Whether a module's parameter is one of theirs."""
        return (id(module._parameters), name) in self.places

    @property
    def anchor(self) -> Tensor | None:
        """What a step takes in the place of their parameters; None where none of them is trained."""
        return ANCHOR if any(parameter.sharded_param.requires_grad for parameter in self.parameters) else None

    def refuse_changed(self, block: str) -> None:
        """Raise where a sharded parameter was written to since forward."""
        if _versions(self.parameters) != self.versions:
            raise BackwardError(
                f"block {block!r}: a parameter that fully_shard shards was changed in place between forward and "
                "backward, so its branch cannot be recomputed as it ran. Change parameters after backward"
            )

    def as_in_forward(self) -> None:
        """Before the modules run once more, within a backward: their hooks gather what is not there."""
        for module in self.modules:
            fsdp_as_in_forward(fsdp_state(module))

    def gathered(self) -> list[Tensor]:
        """After such a run: the parameters that are trained, as the modules computed with them."""
        return [one.unsharded_param for one in self.parameters if one.sharded_param.requires_grad]

    def free(self) -> None:
        """Let go what such a run has gathered, where nothing is to be differentiated."""
        for module in self.modules:
            module.reshard()


def _versions(parameters: Sequence[Any]) -> tuple[int, ...]:
    """How often the values of sharded parameters have been written to."""
    return tuple(parameter.sharded_param._version for parameter in parameters)


def differentiated(
    ends: Sequence[Any], cotangents: Sequence[Tensor], asked: Sequence[Tensor], into: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of the leaves ``asked``, of this graph alone; those of ``into`` are accumulated.

    The hooks of units expect it so, and see to the rest.
    """
    torch.autograd.backward(list(ends), list(cotangents), inputs=[*asked, *into])
    return [leaf.grad for leaf in asked]
