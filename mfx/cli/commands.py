"""Commands: what ``mfx report``, ``mfx fit`` and ``mfx verify`` do with what was typed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mfx.cli.arguments import choices, parser, size_of
from mfx.cli.progress import progress
from mfx.cli.targets import inputs_of, model_of
from mfx.errors import MfxError, OptionError, TooLittleError
from mfx.memory import format_bytes
from mfx.view import Fit, Report, fit, report, verify

_BUDGETS = (1.0, None, 0.5, 0.0)
"""Those that ``mfx fit`` compares where none is named."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; gives the exit status.

    Example:
        >>> main(["report", "torchvision:resnet18", "--input", "2,3,64,64", "--gamma", "1.5"])
        2
    """
    options = parser({"report": _report, "verify": _verify, "fit": _fit}).parse_args(arguments)
    try:
        _check_folder(options.output)
        return options.run(options)
    except MfxError as error:
        print(f"mfx: {error}", file=sys.stderr)
        return 2


def _check_folder(output: str | None) -> None:
    """Refuse a file that could not be written, before the work for it is done."""
    if output and not Path(output).parent.is_dir():
        raise OptionError(f"--output {output!r}: there is no folder {str(Path(output).parent)!r}: make it first")


def _report(options: argparse.Namespace) -> int:
    with progress(f"making {options.model}"):
        model = model_of(options, values=False)
    inputs = inputs_of(options, model, "meta")
    with progress(f"capturing {options.model}"):
        found = report(model, inputs, optimizer=options.optimizer, **choices(options))
    _show(found, options)
    if options.sums and not options.json:
        print(_sums(found))
    return 0


def _sums(found: Report) -> str:
    """The sums that are no residual adds, which the table leaves out."""
    if not found.sums:
        return "\nno other sums"
    rows = [(row.name, row.reason) for row in found.sums]
    return "\n" + tabulate(rows, headers=["other sums", "why it is no residual add"])


def _verify(options: argparse.Namespace) -> int:
    if not options.input:
        raise OptionError("verify runs the model, so it needs --input, such as --input 8,3,224,224")
    with progress(f"making {options.model}"):
        model = model_of(options)
    inputs = inputs_of(options, model, "cpu")
    with progress(f"running {options.model}"):
        result = verify(model, inputs, **choices(options))
    _show(result, options)
    return 0 if result.ok else 1


def _fit(options: argparse.Namespace) -> int:
    if not options.input:
        raise OptionError("fit foresees a step, so it needs --input, such as --input 8,3,224,224")
    with progress(f"making {options.model}"):
        model = model_of(options, values=False)
    inputs, asked = inputs_of(options, model, "meta"), choices(options)
    given = {"dim": options.dim, "optimizer": options.optimizer}
    if options.activation_budget is not None:
        with progress("looking for the largest size"):
            one = fit(model, inputs, size_of(options.memory), **given, **asked)
        _show(one, options)
        return 0
    found: list[Fit] = []
    refused: TooLittleError | None = None
    for budget in _BUDGETS:
        with progress(f"looking for the largest size, activation budget {budget}"):
            try:
                found.append(
                    fit(model, inputs, size_of(options.memory), **given, **{**asked, "activation_budget": budget})
                )
            except TooLittleError as error:
                refused = error
    if not found and refused is not None:
        raise refused
    values = [one.to_dict() for one in found]
    print(json.dumps(values, indent=2) if options.json else _compared(found))
    if options.output:
        _write(values, options.output)
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


def _show(result: Any, options: argparse.Namespace) -> None:
    if options.output and isinstance(result, Report):
        with progress(f"writing {options.output}"):
            result.save(options.output)
    elif options.output:
        _write(result.to_dict(), options.output)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)


def _write(values: Any, path: str) -> None:
    if Path(path).suffix.lower() != ".json":
        raise OptionError(f"--output {path!r}: this command writes .json only (mfx report writes pages and pictures)")
    Path(path).write_text(json.dumps(values, indent=2), encoding="utf-8")
