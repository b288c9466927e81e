"""Transform: momentumnet's ``transform_to_momentumnet``, by the pass.

1. The model is copied; a path names a container, whose entries (or, where these are plain lists, their entries) are
   the blocks.
2. The *owner* of the blocks is the module whose forward runs them one after another: the container, if its own forward
   is called, else the module that holds it and loops over it.
3. The owner becomes a momentumized module in its place, with nothing but these blocks (:mod:`mfx.find.whole.named`).

All parameters keep their names, so a checkpoint of the original loads.

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3; momentumnet 0.10 for names and meanings.
Known limits: an owner that no symbolic tracer can follow is captured by Dynamo when it is first called, and errors
come then.
"""

from __future__ import annotations

import copy
import difflib
import glob
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from torch import nn

from mfx.capture import capture_symbolic, default_form
from mfx.errors import CaptureError, InputTypeError, OptionError
from mfx.graph.notes import STATE
from mfx.model.conversion import check_model, momentum_version
from mfx.options import Options, make_options

Model = TypeVar("Model", bound=nn.Module)
_RESNET = ("layer1", "layer2", "layer3", "layer4")
_LISTS = (nn.ModuleList, nn.ModuleDict)


def transform_to_momentumnet(
    model: Model,
    sub_layers: Iterable[str] | str = _RESNET,
    gamma: float = 0.9,
    use_backprop: bool = False,
    is_residual: bool = False,
    keep_first_layer: bool = True,
    *,
    residual_layers: Iterable[str] | str | None = None,
) -> Model:
    """A copy of ``model`` in which the entries of the named containers are momentum steps.

    With f_i the entries of one container::

        v <- gamma * v + (1 - gamma) * (f_i(x) - x)     is_residual=False: entries are whole blocks
        v <- gamma * v + (1 - gamma) * f_i(x)           is_residual=True: entries are branches
        x <- x + v

    Args:
        model: any module; it is left as it is.
        sub_layers: paths of containers (``nn.Sequential``, ``nn.ModuleList`` ...) whose entries are called in sequence.
        gamma: float in [0, 1).
        use_backprop: True stores activations, False is the reversible run.
        is_residual: whether the entries are the branches of ``x + f(x)``.  Where the model adds x itself, that add
            becomes the step; where it does not (``x = f(x)``), the step is put in its place, as momentumnet does.
        keep_first_layer: leave the first entry of each container as it is; it often changes the shape.
        residual_layers: another name for ``sub_layers``.

    Returns:
        The copy.  Its parameters have the names of the original's, and :func:`mfx.set_gamma`, :func:`mfx.drift` and
        :func:`mfx.chains` work on it.

    Raises:
        OptionError: a path does not exist (what does is listed) or holds no entries; an entry cannot be a step.
        InputTypeError: ``model`` is not a module, or ``gamma`` not a float.

    Example:
        >>> import torch, torchvision, mfx
        >>> mresnet = mfx.transform_to_momentumnet(torchvision.models.resnet18(weights=None), gamma=0.9)
        >>> mresnet(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 1000])
        >>> transformer = torch.nn.Transformer(16, 2, 3, 3, 32, batch_first=True)
        >>> layers = ["encoder.layers", "decoder.layers"]
        >>> mtransformer = mfx.transform_to_momentumnet(transformer, layers, keep_first_layer=False)
        >>> mtransformer(torch.randn(2, 5, 16), torch.randn(2, 4, 16)).shape
        torch.Size([2, 4, 16])

    Source: Sander et al., ICML 2021, arXiv 2102.07870, equation (5).
    """
    check_model(model)
    options = make_options(gamma, reversible=not use_backprop)
    chosen = sub_layers if residual_layers is None else residual_layers
    new = copy.deepcopy(model)
    functions = {path: _functions(new, path, keep_first_layer) for path in _paths(chosen)}
    for owner, inside in _owners(new, functions).items():
        modules = tuple(glob.escape(path.removeprefix(_prefix(owner))) for path in inside)
        kind = "branch" if is_residual else "wrapped"
        new = _replaced(new, owner, replace(options, modules=modules, kind=kind, only_whole=True))
    return new


def _paths(sub_layers: Iterable[str] | str) -> list[str]:
    paths = [sub_layers] if isinstance(sub_layers, str) else list(sub_layers)
    if not paths:
        raise OptionError("sub_layers is empty: name at least one container, such as 'layer1'")
    return paths


def _functions(model: nn.Module, path: str, keep_first: bool) -> list[str]:
    """The paths of the blocks in the container at ``path``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(path, str):
        raise InputTypeError(f"sub_layers takes module paths (str), not {type(path).__name__} ({path!r})")
    if path not in modules or not path:
        containers = [name for name, module in modules.items() if name and next(module.children(), None) is not None]
        near = difflib.get_close_matches(path, containers, n=5, cutoff=0.4)
        listed = ", ".join(map(repr, dict.fromkeys([*near, *containers][:12]))) or "none"
        raise OptionError(
            f"sub_layers={path!r}: {type(model).__name__} has no such module; containers it has: {listed}"
        )
    entries = list(_entries(path, modules[path]))[keep_first:]
    if not entries:
        rest = " beside the first, which keep_first_layer=True keeps" if keep_first else ""
        raise OptionError(f"sub_layers={path!r}: {type(modules[path]).__name__} has no entries{rest}")
    return entries


def _entries(path: str, container: nn.Module) -> Iterator[str]:
    """The entries of a container; lists have no forward, so theirs are taken."""
    for name, child in container.named_children():
        if isinstance(child, _LISTS):
            yield from _entries(f"{path}.{name}", child)
        else:
            yield f"{path}.{name}"


def _owners(model: nn.Module, functions: dict[str, list[str]]) -> dict[str, list[str]]:
    """The blocks of each owner; an owner inside another gives its blocks to that."""
    found: dict[str, list[str]] = {}
    for path, inside in functions.items():
        found.setdefault(_owner(model, path, inside), []).extend(inside)
    for inner in sorted(found, key=len, reverse=True):
        outer = next((path for path in found if path != inner and inner.startswith(_prefix(path))), None)
        if outer is not None:
            found[outer] += found.pop(inner)
    return found


def _owner(model: nn.Module, path: str, functions: list[str]) -> str:
    """The container, if a trace of the module around it shows that its own forward is called; else that module."""
    around, _, _ = path.rpartition(".")
    module = model.get_submodule(around)
    if isinstance(model.get_submodule(path), _LISTS) or STATE in module.__dict__:
        return around
    named = {id(model.get_submodule(function)): function for function in functions}
    try:
        traced = capture_symbolic(module, type(module).forward, default_form(type(module).forward), named)
    except CaptureError:
        return around
    entered = dict(traced.entered)
    return path if path.removeprefix(_prefix(around)) in entered else around


def _replaced(model: Model, owner: str, options: Options) -> Model:
    """``model`` with its ``owner`` as a momentumized module."""
    if not owner:
        return momentum_version(model, options)
    around, _, name = owner.rpartition(".")
    parent = model.get_submodule(around)
    parent._modules[name] = momentum_version(model.get_submodule(owner), options)
    return model


def _prefix(path: str) -> str:
    return f"{path}." if path else ""
