"""Targets: a model by its name, and inputs by their shapes.  Nothing is ever downloaded.

- ``torchvision:NAME`` and ``timm:NAME``: with random parameters.
- ``hf:CONFIG_CLASS`` (``hf:LlamaConfig``): the model that transformers has for that configuration, by ``--set`` of
  the size that is wanted; ``hf:FOLDER``: the model that was saved there.
- ``package.module:callable``: what the callable gives when called with what is ``--set``.

Each ``--input`` is a shape with an optional dtype and, for integers, an upper bound: ``8,3,224,224``,
``8,128:int64:30522``; with a name it is a keyword argument: ``input_ids=8,128:int64:30522``, ``use_cache=False``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfx.errors import InputTypeError, OptionError


def model_of(options: argparse.Namespace, values: bool = True) -> nn.Module:
    """The model that was named; where its ``values`` do not count, large ones are made without."""
    torch.manual_seed(options.seed)
    source, colon, name = options.model.partition(":")
    if not colon or not name:
        raise OptionError(
            f"model {options.model!r} is none of torchvision:NAME, timm:NAME, hf:CONFIG_CLASS, hf:FOLDER and "
            "package.module:callable"
        )
    settings = _settings(options.set)
    made = _MAKERS.get(source)
    model = _imported(source, name, settings) if made is None else made(name, settings, values)
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{options.model} gave {type(model).__name__}, not a torch.nn.Module")
    return model.train(not options.eval).to(dtype_of(options.dtype))


def dtype_of(name: Any) -> torch.dtype:
    """A dtype of torch by its name."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise OptionError(f"{name!r} is not a dtype of torch, such as float32 or bfloat16")
    return dtype


def inputs_of(options: argparse.Namespace, model: nn.Module, device: str) -> Any:
    """Random inputs of the shapes that were typed: a tuple, or a dict where some have names; None where there are none.

    On the meta device they are shapes alone.
    """
    typed = [_named(text) for text in options.input]
    found = [_input(text, bool(name), options.dtype, device) for name, text in typed]
    if not any(name for name, _ in typed):
        return tuple(found) or None
    parameters = inspect.signature(model.forward).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        for name in {name for name, _ in typed if name} - set(parameters):
            raise OptionError(f"--input {name}=...: the model takes {', '.join(parameters)}")
    names = iter(parameters)
    return {name or next(names): value for (name, _), value in zip(typed, found, strict=True)}


def _named(text: str) -> tuple[str, str]:
    name, equal, rest = text.partition("=")
    return (name, rest) if equal else ("", text)


def _input(text: str, named: bool, default: str, device: str) -> Any:
    """A random tensor for one ``--input``; with a name, also a plain value."""
    shape, _, rest = text.partition(":")
    name, _, bound = rest.partition(":")
    if named and text in ("True", "False", "None"):
        return ast.literal_eval(text)
    try:
        sizes = [int(size) for size in shape.split(",")]
        high = int(bound) if bound else 2
    except ValueError as error:
        raise OptionError(f"--input {text!r} is not SHAPE[:DTYPE[:BOUND]], such as 8,3,224,224") from error
    dtype = dtype_of(name or default)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, dtype=dtype, device=device)
    return torch.randint(0, high, sizes, device=device).to(dtype)


def _settings(typed: list[str]) -> dict[str, Any]:
    """The arguments of what makes the model."""
    found: dict[str, Any] = {}
    for text in typed:
        name, equal, value = text.partition("=")
        if not equal:
            raise OptionError(f"--set {text!r} is not NAME=VALUE, such as num_hidden_layers=4")
        found[name] = value
        with contextlib.suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(value)
    return found


def _torchvision(name: str, settings: dict[str, Any], values: bool) -> nn.Module:
    models = _library("torchvision.models", "pip install 'mfx[vision]'")
    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise OptionError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them") from error
    extra = {"init_weights": False} if "init_weights" in inspect.getsource(builder) else {}
    return _made(f"torchvision:{name}", lambda: builder(weights=None, **extra, **settings))


def _timm(name: str, settings: dict[str, Any], values: bool) -> nn.Module:
    timm = _library("timm", "pip install timm")
    if not timm.is_model(name):
        raise OptionError(f"timm has no model {name!r}; timm.list_models('*{name[:5]}*') lists near ones")
    return _made(f"timm:{name}", lambda: timm.create_model(name, pretrained=False, **settings))


def _transformers(name: str, settings: dict[str, Any], values: bool) -> nn.Module:
    library = _library("transformers", "pip install transformers")
    if Path(name).is_dir():
        return _made(f"hf:{name}", lambda: _saved(library, name, settings))
    kind = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, library.PretrainedConfig)):
        raise OptionError(
            f"hf:{name} is neither a folder nor a configuration of transformers, such as hf:LlamaConfig; models of a "
            "hub are not downloaded here"
        )
    # A configuration as it is may stand for billions of parameters.
    with contextlib.nullcontext() if values else torch.device("meta"):
        return _made(f"hf:{name}", lambda: _model_for(library, kind(**settings)))


def _model_for(library: Any, config: Any) -> nn.Module:
    """The model for language of a configuration, where there is one; else its plain one."""
    for auto in (library.AutoModelForCausalLM, library.AutoModelForSeq2SeqLM, library.AutoModel):
        with contextlib.suppress(ValueError):
            return auto.from_config(config)
    raise OptionError(f"transformers has no model for {type(config).__name__}")


def _saved(library: Any, folder: str, settings: dict[str, Any]) -> nn.Module:
    """The model in a folder, with the parameters that are there."""
    config = library.AutoConfig.from_pretrained(folder, local_files_only=True, **settings)
    kind = getattr(library, next(iter(config.architectures or ()), ""), library.AutoModel)
    if any(Path(folder).glob("*.safetensors")):
        return kind.from_pretrained(folder, config=config, local_files_only=True)
    return kind(config) if hasattr(kind, "config_class") else kind.from_config(config)


_MAKERS = {"torchvision": _torchvision, "timm": _timm, "hf": _transformers}


def _library(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"{name.partition('.')[0]} is not installed: {remedy}") from error


def _imported(source: str, name: str, settings: dict[str, Any]) -> Any:
    def make() -> Any:
        found = importlib.import_module(source)
        for part in name.split("."):
            found = getattr(found, part)
        return found(**settings) if callable(found) and not isinstance(found, nn.Module) else found

    sys.path.insert(0, os.getcwd())
    try:
        return _made(f"{source}:{name}", make)
    finally:
        sys.path.remove(os.getcwd())


def _made(name: str, make: Any) -> Any:
    try:
        return make()
    except Exception as error:
        raise OptionError(f"cannot make a model of {name}: {type(error).__name__}: {error}") from error
