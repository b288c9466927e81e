"""The functions of a MomentumNet: what may be one, and how a step calls it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mfx.errors import InputTypeError, OptionError, ShapeError
from mfx.torch_versions import pytree

Names = tuple[tuple[tuple[str, str], ...], ...]
"""For each parameter, all its names: (path of the owner, name)."""


def call_function(path: str, layout: pytree.TreeSpec, net: nn.Module, x: Tensor, *leaves: Any) -> tuple[Tensor]:
    """The branch of one step."""
    args, kwargs = pytree.tree_unflatten(leaves, layout)
    function = net.get_submodule(path)
    value = function(x, *args, **kwargs)
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"function {path} ({type(function).__name__}) returned {type(value).__name__}, not a tensor: a function "
            "maps x to a tensor of its shape. Wrap it in a module that picks one"
        )
    if value.shape != x.shape:
        raise ShapeError(
            f"function {path} ({type(function).__name__}) returned shape {tuple(value.shape)}, but x has shape "
            f"{tuple(x.shape)}: a function must keep the shape. Leave those that change it out of the MomentumNet"
        )
    return (value,)


def parameters_of(path: str, function: nn.Module) -> tuple[Names, tuple[Tensor, ...]]:
    """Each parameter of a function with all its names, relative to the net, and the parameters."""
    names: dict[int, list[tuple[str, str]]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in function.named_parameters(remove_duplicate=False):
        owner, _, last = f"{path}.{name}".rpartition(".")
        names.setdefault(id(parameter), []).append((owner, last))
        tensors[id(parameter)] = parameter
    return tuple(tuple(found) for found in names.values()), tuple(tensors.values())


def listed_functions(functions: Iterable[nn.Module]) -> list[nn.Module]:
    """The functions, each of them a module."""
    if isinstance(functions, nn.Module) and not isinstance(functions, Iterable):
        raise InputTypeError(f"functions must be a list of modules, not one {type(functions).__name__}: give [module]")
    listed = [checked_module(function, f"functions[{index}]") for index, function in enumerate(functions)]
    if not listed:
        raise OptionError("functions is empty: give at least one module")
    return listed


def checked_module(module: Any, argument: str) -> nn.Module:
    """The module, or an error that names the argument."""
    if not isinstance(module, nn.Module):
        raise InputTypeError(
            f"{argument} must be a torch.nn.Module, not {type(module).__name__}: parameters of other callables would "
            "not be found"
        )
    return module


def refuse_hidden(leaves: list[Any]) -> None:
    """Tensors inside objects that cannot be taken apart would lose their gradient."""
    for leaf in leaves:
        held = getattr(leaf, "__dict__", {}).items() if not isinstance(leaf, (Tensor, nn.Module)) else ()
        for name, value in held:
            if isinstance(value, Tensor) and value.requires_grad:
                raise InputTypeError(
                    f"an argument of type {type(leaf).__name__} holds a tensor that needs a gradient ({name!r}), which "
                    "would be lost: hand tensors over as they are, or in tuples, lists or dicts"
                )
