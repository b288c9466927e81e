"""Survey: which models of timm and Hugging Face can be captured and rewritten, and are right afterwards.

One small model of every timm family, and tiny random configurations of Hugging Face architectures, in float64 and
train mode with dropout alive.  For each model:

1. it is captured once (fx, or Dynamo where fx cannot follow) and rewritten;
2. at gamma = 0, outputs, gradients and buffers are compared with the original's under the same seed;
3. at gamma = 0.9, those of the reversible run with those of the stored run.

Usage: ``python benchmarks/survey.py [timm|hf] [NAME ...] [--table results.jsonl ...]``; prints one JSON object a
model, and with ``--table`` the Markdown table of earlier output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mfx
from mfx.model.conversion import momentum_of
from mfx.pipeline import Passed
from mfx.plan import plan
from mfx.rewrite import ByRoot, rewrite

TOLERANCE = 1e-8
"""Relative error allowed in float64; a bias before a BatchNorm has no gradient but noise, so it is of the whole."""
_NO_BLOCK = {"PROJECTION", "SCALED_SKIP", "NO_PARAMETERS", "BROADCAST"}
"""What an add is that has no skip which x passes as it is, or no branch that learns."""
_SMALL_FIRST = "atto femto pico nano xxtiny xxs xtiny tiny _ti_ mini _xs _s0 _t0 b0 _a0 _002 18 _s small 26".split()


def timm_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """One model for each timm family: the smallest of those whose names promise it."""
    import timm

    for family in timm.list_modules():
        names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        if names:
            yield family, lambda names=names: _timm_model(timm, names)


def _timm_model(timm: Any, names: list[str]) -> tuple[nn.Module, Any]:
    def rank(name: str) -> int:
        return next((i for i, word in enumerate(_SMALL_FIRST) if word in name), len(_SMALL_FIRST))

    sizes = {}
    for name in sorted(names, key=rank)[:3]:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    name = min(sizes, key=sizes.__getitem__)
    image = timm.get_pretrained_cfg(name).input_size[-1]
    dropout = {"drop_rate": 0.1, "drop_path_rate": 0.1}
    narrow = {"depth": 4, "embed_dim": 48, "num_heads": 3}
    for size in (64, image):
        for shrunk in (narrow, {}) if sizes[name] > 8e6 else ({},):
            for given in ({**dropout, "img_size": size}, dropout, {"drop_rate": 0.1}, {}):
                try:
                    model = timm.create_model(name, num_classes=5, **given, **shrunk)
                    inputs = (torch.randn(2, 3, size, size),)
                    _call(model.eval(), inputs)
                except Exception:
                    continue
                return model, inputs
    raise RuntimeError(f"{name} could not be built and run")


def huggingface_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Tiny random configurations."""
    from survey_models import MODELS

    yield from MODELS.items()


def survey(name: str, make: Callable[[], tuple[nn.Module, Any]]) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"family": name}
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        model, inputs = make()
        inputs = pytree.tree_map_only(torch.Tensor, _double, inputs)
        row["model"] = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        model.double().train()
        _compare(model, inputs, row)
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {_in_a_line(error)}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _in_a_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("symbolic tracing", "its Python", "Explanation", "Hint"))]
    return " ".join((lines if len(told) < 2 else told)[-4:])[:400]


def _compare(model: nn.Module, inputs: Any, row: dict[str, Any]) -> None:
    expected = _run(model, inputs)
    mm = mfx.momentumize(model, 0.0, example_inputs=inputs)
    momentum = momentum_of(mm)
    (entry,) = momentum.entries
    row["capture"] = "dynamo" if momentum.options.capture == "dynamo" else "fx"
    row["rewritten"] = sum(map(len, entry.passed.plan.names))
    row["chains"] = len(entry.passed.plan.chains)
    row["kept"] = sorted({rejection.reason.name for rejection in entry.passed.plan.rejections})
    row["gamma_0"] = _error(_run(mm, inputs), expected)
    mfx.set_gamma(mm, 0.9)
    got = _run(mm, inputs)
    momentum.options = replace(momentum.options, reversible=False)
    for index, old in enumerate(momentum.entries):
        found = old.passed.found
        planned = plan(found, momentum.options)
        passed = Passed(found, planned, rewrite(found, planned, ByRoot()))
        momentum.entries[index] = replace(old, passed=passed)
    row["gradients"] = _error(got, _run(mm, inputs))


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _run(model: nn.Module, inputs: Any) -> list[list[Tensor]]:
    """Outputs, gradients of all parameters, buffers; the model is left as it is."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    outputs = [leaf for leaf in _leaves(_call(model, inputs)) if leaf.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (out, torch.randn(out.shape, generator=generator, dtype=out.dtype)) for out in outputs if out.requires_grad
    ]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs_used, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs_used, parameters, cotangents, allow_unused=True)
    moved = [buffer.detach().clone() for buffer in model.buffers()]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    gradients = [torch.zeros(()) if grad is None else grad for grad in found]
    return [[out.detach() for out in outputs], gradients, moved]


def _leaves(output: Any) -> list[Tensor]:
    tree = dict(output) if hasattr(output, "keys") else output
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _error(got: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """The largest relative L2 error of outputs, gradients, buffers."""
    errors = []
    for ours, theirs in zip(got, expected, strict=True):
        norm = sum(float(b.double().square().sum()) for b in theirs) ** 0.5
        difference = (
            sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5
        )
        errors.append(difference / norm if norm else difference)
    return max(errors)


def verdict(row: dict[str, Any]) -> str:
    """``right``, ``no residual block``, or what is wrong."""
    if "gradients" not in row:
        return "failed"
    if not row["rewritten"]:
        return "kept" if set(row["kept"]) - _NO_BLOCK else "no residual block"
    right = row["gamma_0"] < TOLERANCE and row["gradients"] < TOLERANCE
    return "right" if right else "WRONG"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, after a summary."""
    verdicts = [verdict(row) for row in rows]
    residual = [row for row, said in zip(rows, verdicts, strict=True) if said != "no residual block"]
    right = verdicts.count("right")
    lines = [
        f"{len(rows)} models, {len(residual)} of them residual; {right} ({right / max(len(residual), 1):.0%}) "
        "rewritten, equal to the original at gamma = 0, and with the gradients of the stored run.",
        "",
        "| family | model | capture | blocks | chains | gamma = 0 | reversible - stored | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, said in zip(rows, verdicts, strict=True):
        why = row.get("reason") or (", ".join(row["kept"]) if said == "kept" else "")
        numbers = [f"{row[key]:.0e}" if key in row else "" for key in ("gamma_0", "gradients")]
        cells = [
            row["family"],
            row.get("model", ""),
            row.get("capture", ""),
            row.get("rewritten", ""),
            row.get("chains", ""),
        ]
        said = f"{said}: {why}".replace("|", "/") if why else said
        lines.append("| " + " | ".join(map(str, [*cells, *numbers, said])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", choices=["timm", "hf"], default="hf")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", nargs="+", type=Path, help="print the table of these files")
    arguments = parser.parse_args()
    if arguments.table:
        rows = [json.loads(line) for path in arguments.table for line in path.read_text().splitlines() if line]
        print(table(rows))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, make in timm_models() if arguments.source == "timm" else huggingface_models():
        if not arguments.names or name in arguments.names:
            torch._dynamo.reset()
            print(json.dumps(survey(name, make)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
