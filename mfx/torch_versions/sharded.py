"""What ``fully_shard`` (FSDP2) made of modules, as far as mfx uses what torch does not promise."""

from __future__ import annotations

import sys
from typing import Any

import torch


def fsdp_state(module: torch.nn.Module) -> Any:
    """What ``fully_shard`` (FSDP2) made of a module; None where it was not applied to it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody has imported it, nobody has used it
    held: Any = module
    return held._get_fsdp_state() if fsdp is not None and isinstance(module, fsdp.FSDPModule) else None


def fsdp_states() -> list[Any]:
    """All that ``fully_shard`` has made."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed._composable_state import _module_state_mapping

    states = {id(state): state for reference in _module_state_mapping.values() if (state := reference()) is not None}
    return [state for state in states.values() if hasattr(state, "_mp_policy")]


def fsdp_shared(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let ``other``, an object beside ``module`` with its hooks, have the same state."""
    from torch.distributed._composable_state import _insert_module_state

    if (state := fsdp_state(module)) is not None:
        _insert_module_state(other, state)


def fsdp_parameters(state: Any) -> list[Any]:
    """The parameters of a module that FSDP2 shards: one group in torch 2.11, and several later."""
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [parameter for group in groups if group is not None for parameter in group.fsdp_params]


def fsdp_places(parameter: Any) -> list[tuple[torch.nn.Module, str]]:
    """The modules that hold one of these, each with its name there."""
    info = parameter._module_info
    return [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]


def fsdp_as_in_forward(state: Any) -> None:
    """Have hooks gather and reduce within a backward, even where the module has had its own in this one already."""
    state._training_state = type(state._training_state).IDLE
