"""The command line: ``mfx report``, ``mfx fit`` and ``mfx verify`` for a model that can be named.

A model is ``torchvision:NAME`` or ``package.module:callable``, the callable giving a module when called without
arguments.  Each ``--input`` is a shape with an optional dtype and, for integers, an upper bound:
``8,3,224,224``, ``8,128:int64:30522``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import sys
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from mfx.errors import InputTypeError, MfxError, OptionError, TooLittleError
from mfx.memory import format_bytes
from mfx.view import Fit, fit, report, verify


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; gives the exit status.

    Example:
        >>> main(["report", "torchvision:resnet18", "--input", "2,3,64,64", "--gamma", "1.5"])
        2
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except MfxError as error:
        print(f"mfx: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mfx", description="Momentum residual networks as a compiler pass.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, summary in (
        ("report", _report, "which residual blocks can be rewritten, which cannot, and why"),
        (
            "verify",
            _verify,
            "against the original at gamma = 0, reversible against stored, and memory, on random inputs",
        ),
        ("fit", _fit, "the largest batch, or sequence, whose training step fits a memory, as foreseen"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("model", help="torchvision:NAME or package.module:callable")
        command.add_argument(
            "--input", action="append", default=[], metavar="SHAPE[:DTYPE[:BOUND]]", help="one for each argument"
        )
        command.add_argument("--gamma", type=float, default=0.9)
        command.add_argument("--include", action="append", metavar="PATTERN")
        command.add_argument("--exclude", action="append", metavar="PATTERN")
        command.add_argument("--modules", action="append", metavar="PATTERN")
        command.add_argument(
            "--activation-budget", type=_budget, metavar="BYTES", help="such as 8GB, or a fraction of plain backprop's"
        )
        command.add_argument("--dtype", default="float32", help="of the model and its floating inputs")
        command.add_argument("--eval", action="store_true", help="in eval mode instead of train mode")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        if run is not _verify:
            command.add_argument("--optimizer", metavar="NAME", help="count its state too: a class of torch.optim")
        if run is _fit:
            command.add_argument("--memory", required=True, metavar="BYTES", help="what there is, such as 8GB")
            command.add_argument("--dim", type=int, default=0, help="the dimension that varies; 0, the batch")
    return parser


def _report(options: argparse.Namespace) -> int:
    model = _model(options)
    inputs = tuple(_input(text, options.dtype, "meta") for text in options.input)
    _show(report(model, inputs or None, optimizer=options.optimizer, **_choices(options)), options)
    return 0


_BUDGETS = (1.0, None, 0.5, 0.0)
"""Those that ``mfx fit`` compares where none is named."""


def _fit(options: argparse.Namespace) -> int:
    if not options.input:
        raise OptionError("fit foresees a step, so it needs --input, such as --input 8,3,224,224")
    model, choices = _model(options), _choices(options)
    inputs = tuple(_input(text, options.dtype, "meta") for text in options.input)
    given = {"dim": options.dim, "optimizer": options.optimizer}
    if options.activation_budget is not None:
        _show(fit(model, inputs, _size(options.memory), **given, **choices), options)
        return 0
    found: list[Fit] = []
    refused: TooLittleError | None = None
    for budget in _BUDGETS:
        try:
            found.append(fit(model, inputs, _size(options.memory), **given, **{**choices, "activation_budget": budget}))
        except TooLittleError as error:
            refused = error
    if not found and refused is not None:
        raise refused
    print(json.dumps([one.to_dict() for one in found], indent=2) if options.json else _compared(found))
    return 0


def _compared(found: list[Fit]) -> str:
    """A row for each budget that something fits."""
    rows = [
        (
            "none, chains reversed" if one.activation_budget is None else one.activation_budget,
            one.size,
            format_bytes(one.bytes),
            format_bytes(one.step.activations or 0),
            one.limit if one.next_bytes is None else format_bytes(one.next_bytes),
        )
        for one in found
    ]
    headers = ["activation budget", "largest size", "a step needs", "of it activations", "the next size would need"]
    return f"{found[0].model}, in dimension {found[0].dim}, within {format_bytes(found[0].memory)}:\n\n" + tabulate(
        rows, headers=headers, disable_numparse=True
    )


def _verify(options: argparse.Namespace) -> int:
    if not options.input:
        raise OptionError("verify runs the model, so it needs --input, such as --input 8,3,224,224")
    model = _model(options)
    result = verify(model, tuple(_input(text, options.dtype, "cpu") for text in options.input), **_choices(options))
    _show(result, options)
    return 0 if result.ok else 1


def _show(result: Any, options: argparse.Namespace) -> None:
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)


_CHOICES = ("gamma", "include", "exclude", "modules", "activation_budget")


def _size(text: str) -> int | str:
    """A size as it is typed: 123456 are bytes, 8GB a text."""
    return int(text) if text.isdecimal() else text


def _budget(text: str) -> int | float | str:
    """A budget as it is typed: 123456 are bytes, 0.5 is a fraction, 8GB a text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _CHOICES}


def _model(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(options.seed)
    source, colon, name = options.model.partition(":")
    if not colon or not name:
        raise OptionError(f"model {options.model!r} is neither torchvision:NAME nor package.module:callable")
    model = _torchvision(name) if source == "torchvision" else _imported(source, name)
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{options.model} gave {type(model).__name__}, not a torch.nn.Module")
    return model.train(not options.eval).to(_dtype(options.dtype))


def _torchvision(name: str) -> nn.Module:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise OptionError("torchvision is not installed: pip install 'mfx[vision]'") from error
    try:
        builder = models.get_model_builder(name)
    except ValueError as error:
        raise OptionError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them") from error
    extra = {"init_weights": False} if "init_weights" in inspect.getsource(builder) else {}
    return builder(weights=None, **extra)


def _imported(source: str, name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(source)
        for part in name.split("."):
            found = getattr(found, part)
        return found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:
        raise OptionError(f"cannot make a model of {source}:{name}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise OptionError(f"{name!r} is not a dtype of torch, such as float32 or bfloat16")
    return dtype


def _input(text: str, default: str, device: str) -> torch.Tensor:
    """A random tensor for one ``--input``; on the meta device, its shape alone."""
    shape, _, rest = text.partition(":")
    name, _, bound = rest.partition(":")
    try:
        sizes = [int(size) for size in shape.split(",")]
        high = int(bound) if bound else 2
    except ValueError as error:
        raise OptionError(f"--input {text!r} is not SHAPE[:DTYPE[:BOUND]], such as 8,3,224,224") from error
    dtype = _dtype(name or default)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, dtype=dtype, device=device)
    return torch.randint(0, high, sizes, device=device).to(dtype)
