"""Classes of models that save themselves together with a configuration, as Hugging Face's do.

``save_pretrained`` of a momentumized one writes the recipe (:mod:`mfx.model.saved.recipe`) into the configuration, and,
where gamma is not 0, one tensor more, by which the plain class says that it does not know the file whole.  What
makes models of the class (``type(mm)(config)``, ``type(mm).from_pretrained``) would make the plain network, and raises.

Known limits: adapters saved by themselves (PEFT) say nothing of the model that they are for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from mfx.errors import InputTypeError
from mfx.graph.notes import STATE
from mfx.model.saved.recipe import MARK, RECIPE, recipe_of


def saving(mm: nn.Module) -> nn.Module:
    """``mm``, a copy of a model, of a class that saves the recipe; as it is where its class saves nothing."""
    if saving_methods(type(mm)):
        mm.__class__ = _saving_class(type(mm))
    return mm


def saving_methods(original: Any) -> dict[str, Any]:
    """The methods of a subclass that differ; none for a class that does not save itself."""
    if not hasattr(original, "save_pretrained") or not hasattr(original, "from_pretrained"):
        return {}

    @functools.wraps(original.save_pretrained)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not any(STATE in module.__dict__ for module in self.modules()):
            return original.save_pretrained(self, *args, **kwargs)
        recipe = recipe_of(self)
        gammas = [0.0] if "rule" in recipe["options"] else _moving(recipe["options"]["gamma"])
        if gammas and not getattr(self, "_hf_peft_config_loaded", False):
            kwargs["state_dict"] = {**(kwargs.get("state_dict") or self.state_dict()), MARK: torch.tensor(gammas)}
        setattr(self.config, RECIPE, recipe)
        try:
            return original.save_pretrained(self, *args, **kwargs)
        finally:
            delattr(self.config, RECIPE)

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise InputTypeError(_refusal(original, "momentumize one of that class"))

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise InputTypeError(_refusal(original, f"mfx.from_pretrained({original.__name__}, path) loads a momentum one"))

    return {"save_pretrained": save_pretrained, "__init__": refuse, "from_pretrained": classmethod(from_pretrained)}


def _refusal(original: type[nn.Module], instead: str) -> str:
    return (
        f"this is the class of a momentumized {original.__name__}, and would make the plain network: "
        f"take {original.__module__}.{original.__qualname__} for that; {instead}"
    )


def _moving(gamma: Any) -> list[float]:
    """The gammas that are not 0."""
    if isinstance(gamma, dict) and not gamma.keys().isdisjoint(("python", "mfx")):
        return [float("nan")]
    if isinstance(gamma, dict) and "tensor" not in gamma:
        return [value for one in gamma.values() for value in _moving(one)]
    values = torch.as_tensor(gamma["tensor"] if isinstance(gamma, dict) else gamma, dtype=torch.float64)
    return [float(value) for value in values.flatten() if value != 0]


@functools.cache
def _saving_class(original: type[nn.Module]) -> type[Any]:
    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (original,), self.__dict__

    namespace = {
        **saving_methods(original),
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (original,), namespace)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """An empty one, for unpickling."""
    return nn.Module.__new__(_saving_class(original))
