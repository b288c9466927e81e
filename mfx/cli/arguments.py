"""Arguments: the parser, with an argument for each option of the Python call.

Options are those of :func:`mfx.options.make_options`: one that is new there is an argument here, whose value is
read as Python where that is possible, and as text elsewhere.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from mfx.cli.targets import dtype_of
from mfx.errors import OptionError
from mfx.options import make_options

_SUMMARIES = {
    "report": "which residual blocks can be rewritten, which cannot, and why",
    "verify": "against the original at gamma = 0, reversible against stored, and memory, on random inputs",
    "fit": "the largest batch, or sequence, whose training step fits a memory, as foreseen",
}
_PATTERNS = {"action": "append", "metavar": "PATTERN"}


def parser(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser; each command's function is ``run`` of what is parsed."""
    found = argparse.ArgumentParser(prog="mfx", description="Momentum residual networks as a compiler pass.")
    found.add_argument("--version", action="version", version=f"mfx {version('mfx')}, torch {torch.__version__}")
    inner = found.add_subparsers(required=True, metavar="COMMAND")
    for name, run in commands.items():
        command = inner.add_parser(name, help=_SUMMARIES[name], description=_SUMMARIES[name])
        command.set_defaults(run=run)
        _add_target(command)
        for option, default in _options().items():
            ways = {"help": "as in the Python call", "type": _value, **_WAYS.get(option, {})}
            if "action" in ways:
                del ways["type"]
            default = None if ways.get("action") == "append" else default
            command.add_argument(f"--{option.replace('_', '-')}", **{"default": default, **ways})
        if name != "verify":
            command.add_argument("--optimizer", metavar="NAME", help="count its state too: a class of torch.optim")
        if name == "report":
            command.add_argument("--sums", action="store_true", help="list sums that are no residual adds, too")
        if name == "fit":
            command.add_argument("--memory", required=True, metavar="BYTES", help="what there is, such as 8GB")
            command.add_argument("--dim", type=int, default=0, help="the dimension that varies; 0, the batch")
    return found


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", help="torchvision:NAME, timm:NAME, hf:CONFIG_CLASS, hf:FOLDER or package.module:callable"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of what makes the model"
    )
    command.add_argument(
        "--input", action="append", default=[], metavar="[NAME=]SHAPE[:DTYPE[:BOUND]]", help="one for each argument"
    )
    command.add_argument("--dtype", default="float32", help="of the model and its floating inputs")
    command.add_argument("--eval", action="store_true", help="in eval mode instead of train mode")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--output", metavar="FILE", help="write it as well: .json; a report as .html, .svg, .png, too")


def _options() -> dict[str, Any]:
    """The options of the Python call, with their defaults."""
    return {name: one.default for name, one in inspect.signature(make_options).parameters.items()}


def choices(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were typed, as keyword arguments."""
    found = {name: getattr(options, name) for name in _options()}
    found["gamma"] = _options()["gamma"] if options.gamma is None else _gamma(options.gamma)
    if found["state_dtype"] != "auto":
        found["state_dtype"] = dtype_of(found["state_dtype"])
    return found


def size_of(text: str) -> int | str:
    """A size as it is typed: 123456 are bytes, 8GB a text."""
    return int(text) if text.isdecimal() else text


def _value(text: str) -> Any:
    """A value as it is typed: Python where it can be read as such, else the text."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def _gamma(typed: list[str]) -> float | dict[str, float]:
    """One gamma for all, or one for each pattern."""
    pairs = [text.rpartition("=") for text in typed]
    if len(pairs) == 1 and not pairs[0][0]:
        return _number(pairs[0][2])
    if not all(pattern for pattern, _, _ in pairs):
        raise OptionError(f"--gamma {' '.join(typed)}: give one number, or PATTERN=NUMBER each time")
    return {pattern: _number(value) for pattern, _, value in pairs}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"--gamma {text!r} is not a number") from error


_WAYS: dict[str, dict[str, Any]] = {
    "gamma": {"action": "append", "metavar": "[PATTERN=]NUMBER", "help": "for all blocks, or several with a pattern"},
    "include": _PATTERNS,
    "exclude": _PATTERNS,
    "modules": _PATTERNS,
    "velocity": {"choices": ("zero", "first")},
    "reversible": {"action": argparse.BooleanOptionalAction},
    "state_dtype": {"type": str, "metavar": "DTYPE"},
    "tolerance": {"type": float},
    "capture": {"choices": ("auto", "fx", "dynamo")},
    "activation_budget": {"metavar": "BYTES", "help": "such as 8GB, or a fraction of plain backprop's"},
}
"""How options are typed that are not plain values."""
