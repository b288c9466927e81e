"""Recipe: what makes a momentum network of the plain one, as values that JSON can hold.

It has the options, among them gamma as it is now; the names of the blocks of each chain, by which a later reader can
see that it made the same network; and shapes, dtypes and plain values of the example inputs, which some captures need.

Rules and gammas of mfx's own are in it by name, and what a :class:`mfx.LearnedGamma` has learned.

Known limits: options that are Python (a rule of one's own) are not in it and have to be given again; a network with
learned velocities, or gammas of one's own modules, is not made again by its recipe.
"""

from __future__ import annotations

import dataclasses
import glob
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mfx.errors import OptionError
from mfx.model.parts import ADDED, full_names, parts_of
from mfx.options import gamma_of, make_options
from mfx.rule import Leapfrog, LearnedGamma, Midpoint, Momentum, RandomSign

RECIPE = "mfx"
"""The entry of a model's configuration that has the recipe."""
MARK = "momentum_network.load_it_with_mfx_from_pretrained"
"""A tensor (the gammas) beside a momentum network's parameters in a file, so that who loads it as another is told."""
EXAMPLE = "_mfx_example"
"""Attribute of a momentumized model that saves itself: the form of its example inputs."""

_OWN: dict[str, Any] = {kind.__name__: kind for kind in (Leapfrog, LearnedGamma, Midpoint, Momentum, RandomSign)}
_PLAIN = (bool, int, float, str, type(None))


def recipe_of(mm: nn.Module) -> dict[str, Any]:
    """The recipe of a momentumized model.

    Raises:
        InputTypeError: it has no momentumized part.
    """
    parts = parts_of(mm)
    options = next((part.options for part in parts.values() if hasattr(part, "options")), None)  # type: ignore[attr-defined]
    names = [name for name in inspect.signature(make_options).parameters if getattr(options, name, None) is not None]
    given = {name: _encoded(getattr(options, name)) for name in names}
    gammas = {
        name: _encoded(gamma_of(part.options.gamma, block))  # type: ignore[attr-defined]
        for path, part in parts.items()
        for name, block in zip(full_names(path, part), part.blocks(), strict=True)
    }
    same = len({str(gamma) for gamma in gammas.values()}) == 1
    if not callable(options.gamma):  # type: ignore[union-attr]
        given["gamma"] = next(iter(gammas.values())) if same else gammas
    chains = [list(chain) for part in parts.values() for chain in getattr(part, "chains", None) or ()]
    recipe = {"options": given, "chains": chains, "example": mm.__dict__.get(EXAMPLE)}
    if isinstance(options.gamma, LearnedGamma):  # type: ignore[union-attr]
        recipe["learned"] = {name: _encoded(value) for name, value in mm.state_dict().items() if _is_added(name)}
    return recipe


def _is_added(name: str) -> bool:
    """Whether an entry of a state_dict is of what gives velocities or gammas."""
    return any(part in ADDED for part in name.split("."))


def learned_of(recipe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a recipe has of learned gammas, as a part of a state_dict."""
    return {name: _decoded(value) for name, value in recipe.get("learned", {}).items()}


def options_of(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe, as keyword arguments; those ``given`` come first.

    Raises:
        OptionError: an option that is Python is not given, or one is learned.
    """
    saved = {name: _decoded(value) for name, value in recipe["options"].items()}
    for name in ("gamma", "velocity"):
        if isinstance(saved[name], _Python):
            raise OptionError(
                f"the model was saved with {name}={saved[name].name}, which modules of one's own learn: load the "
                f"plain class from there, momentumize that with {name}= as it was, and load what the file has of "
                "momentum_... with load_state_dict(..., strict=False)"
            )
    options = {**saved, **given}
    for name, value in options.items():
        if isinstance(value, _Python):
            raise OptionError(
                f"the model was saved with {name}={value.name}, which is Python and was not saved: give {name}= again"
            )
    gamma = options["gamma"]
    if isinstance(gamma, dict) and "gamma" not in given:
        options["gamma"] = {glob.escape(name): value for name, value in gamma.items()}
    return options


class _Python:
    """Stands for a value that could not be saved."""

    def __init__(self, name: str) -> None:
        self.name = name


def _encoded(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if type(value).__name__ in _OWN and type(value) is _OWN[type(value).__name__]:
        return {"mfx": type(value).__name__, **dataclasses.asdict(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), **_encoded(value.dtype)}
    if isinstance(value, Mapping):
        return {str(key): _encoded(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encoded(one) for one in value]
    kind = value if hasattr(value, "__qualname__") else type(value)
    return {"python": f"{kind.__module__}.{kind.__qualname__}"}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.get("mfx") in _OWN:
        return _OWN[value["mfx"]](**{name: one for name, one in value.items() if name != "mfx"})
    if "python" in value:
        return _Python(value["python"])
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if set(value) == {"dtype"}:
        return getattr(torch, value["dtype"])
    return {key: _decoded(one) for key, one in value.items()}


def form_of(inputs: Any) -> Any:
    """The form of example inputs: of tensors, shape and dtype."""
    if isinstance(inputs, torch.Tensor):
        return {"shape": [int(size) for size in inputs.shape], **_encoded(inputs.dtype)}
    if isinstance(inputs, Mapping):
        return {str(key): form_of(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [form_of(value) for value in inputs]
    return _encoded(inputs)


def inputs_of(form: Any) -> Any:
    """Inputs of a form: ones where they are whole numbers (tokens, masks), else random."""
    if isinstance(form, list):
        return tuple(inputs_of(one) for one in form)
    if not isinstance(form, dict):
        return form
    if "shape" in form and "dtype" in form:
        dtype = getattr(torch, form["dtype"])
        floating = dtype.is_floating_point or dtype.is_complex
        return torch.randn(form["shape"], dtype=dtype) if floating else torch.ones(form["shape"], dtype=dtype)
    return _decoded(form) if set(form) <= {"dtype", "python"} and form else {k: inputs_of(v) for k, v in form.items()}
