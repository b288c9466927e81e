"""Survey: which models of other libraries can be captured and rewritten, and are right afterwards.

One small model of every timm family, and tiny random configurations of Hugging Face architectures and of what people
run out of memory on (diffusion transformers, restoration, language models of other libraries: the extra ``survey``
has these), in float64 and train mode with dropout alive.  For each model:

1. it is captured (fx, or Dynamo where fx cannot follow or the proof refuses what it gave) and rewritten;
2. at gamma = 0, outputs, gradients and buffers are compared with the original's under the same seed;
3. at gamma = 0.9, those of the reversible run with those of the stored run; and how many of the bytes that the
   original keeps for backward are kept;
4. the seconds until the first call has returned (``momentumize`` and a forward) and those of them that the proofs of
   its captures took; what a proof that refused said.

Usage: ``python benchmarks/survey.py [timm|hf|more] [NAME ...] [--table results.jsonl ...]``; prints one JSON object a
model, and with ``--table`` the Markdown table of earlier output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mfx
from mfx.errors import CaptureError
from mfx.memory import kept_bytes
from mfx.model import state
from mfx.model.parts import parts_of
from mfx.model.state import Momentum
from mfx.pipeline import Passed
from mfx.plan import plan
from mfx.rewrite import ByRoot, rewrite

TOLERANCE = 1e-8
"""Relative error allowed in float64; a bias before a BatchNorm has no gradient but noise, so it is of the whole."""
_NO_BLOCK = {"PROJECTION", "SUBTRACTED_SKIP", "NO_PARAMETERS", "BROADCAST"}
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


def more_models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Small configurations of models with several streams, long skips, groups of blocks."""
    from survey_more import MODELS

    yield from MODELS.items()


SOURCES = {"timm": timm_models, "hf": huggingface_models, "more": more_models}


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


@dataclass
class _Proofs:
    """What the proofs of one model's captures took, and the first difference where they refused."""

    held: int = 0
    seconds: float = 0.0
    refused: list[str] = field(default_factory=list)


@contextmanager
def _proofs_timed() -> Iterator[_Proofs]:
    """Time each proof meanwhile; what else a first call does runs as it would without them."""
    found, prove = _Proofs(), state.prove

    def timed(*args: Any) -> bool:
        start = time.perf_counter()
        try:
            held = prove(*args)
            found.held += held
            return held
        except CaptureError as error:
            found.refused.append(" | ".join(line.strip() for line in str(error).splitlines()[1:3]))
            raise
        finally:
            found.seconds += time.perf_counter() - start

    state.prove = timed
    try:
        yield found
    finally:
        state.prove = prove


def _compare(model: nn.Module, inputs: Any, row: dict[str, Any]) -> None:
    expected = _run(model, inputs)
    with _proofs_timed() as proofs:
        start = time.perf_counter()
        mm = mfx.momentumize(model, 0.0, example_inputs=inputs)
        got = _run(mm, inputs, row.setdefault("forward", []))
        row["first_call"] = row.pop("forward")[0] - start
    row |= {"proofs": proofs.held, "proof": proofs.seconds, "refused": proofs.refused}
    sides = [side for side in parts_of(mm).values() if isinstance(side, Momentum)]
    entries = [side.latest_entry() for side in sides]
    row["capture"] = "/".join(sorted({"dynamo" if side.options.capture == "dynamo" else "fx" for side in sides}))
    row["rewritten"] = sum(len(names) for entry in entries for names in entry.passed.plan.names)
    row["chains"] = sum(len(entry.passed.plan.chains) for entry in entries)
    row["parts"] = len(sides)
    row["kept"] = sorted({rejection.reason.name for entry in entries for rejection in entry.passed.plan.rejections})
    row["gamma_0"] = _error(got, expected)
    mfx.set_gamma(mm, 0.9)
    got = _run(mm, inputs)
    row["share"] = _kept(mm, inputs) / _kept(model, inputs)
    for side in sides:
        _store(side)
    row["gradients"] = _error(got, _run(mm, inputs))


def _kept(net: nn.Module, inputs: Any) -> int:
    """The bytes that a forward keeps for backward; the model is left as it is."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in net.buffers()]
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    kept, _ = kept_bytes(net, tensors, lambda: _call(net, inputs))
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return kept


def _store(side: Momentum) -> None:
    """Run the graphs of a part with stored activations from now on."""
    side.options = replace(side.options, reversible=False)
    for index, old in enumerate(side.entries):
        found = old.passed.found
        planned = plan(found, side.options, side.place.numbers, side.place.first, side.places)
        side.entries[index] = replace(old, passed=Passed(found, planned, rewrite(found, planned, ByRoot())))


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _run(model: nn.Module, inputs: Any, returned: list[float] | None = None) -> list[list[Tensor]]:
    """Outputs, gradients of all parameters, buffers; the model is left as it is.  Notes when forward has returned."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    output = _call(model, inputs)
    if returned is not None:
        returned.append(time.perf_counter())
    outputs = [leaf for leaf in _leaves(output) if leaf.is_floating_point()]
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


def cost(rows: list[dict[str, Any]]) -> str:
    """What the proofs cost, in a sentence; captures by Dynamo need none."""
    proven = [row for row in rows if row.get("proofs")]
    if not proven:
        return "No capture needed a proof."
    first, without = ([row["first_call"] - row["proof"] * left for row in proven] for left in (0, 1))
    most = max(proven, key=lambda row: row["proof"])
    return (
        f"Until the first call had returned, models with proven captures ({len(proven)}) took {sum(first):.1f} s, "
        f"{sum(without):.1f} s of them without the proof (medians {median(first):.2f} s and {median(without):.2f} s); "
        f"the longest, {most['family']}'s, took {most['proof']:.1f} s of {most['first_call']:.1f} s. "
        f"Captures that a proof refused: {sum(len(row.get('refused', ())) for row in rows)}."
    )


def _saved(rows: list[dict[str, Any]]) -> str:
    shares = [row["share"] for row in rows if "share" in row]
    return f" They keep {median(shares):.3f} (median) of the bytes that plain backprop keeps." if shares else ""


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, after a summary."""
    verdicts = [verdict(row) for row in rows]
    residual = [row for row, said in zip(rows, verdicts, strict=True) if said != "no residual block"]
    right = verdicts.count("right")
    lines = [
        f"{len(rows)} models, {len(residual)} of them residual; {right} ({right / max(len(residual), 1):.0%}) "
        f"rewritten, equal to the original at gamma = 0, and with the gradients of the stored run.{_saved(rows)}",
        "",
        cost(rows),
        "",
        "| family | model | capture | blocks | chains | bytes kept, of plain | gamma = 0 | reversible - stored "
        "| first call, s | without proof | verdict |",
        "| --- " * 11 + "|",
    ]
    for row, said in zip(rows, verdicts, strict=True):
        why = row.get("reason") or (", ".join(row["kept"]) if said == "kept" else "")
        numbers = [f"{row[key]:.0e}" if key in row else "" for key in ("gamma_0", "gradients")]
        known = "first_call" in row
        seconds = [f"{row['first_call'] - row['proof'] * left:.1f}" if known else "" for left in (0, 1)]
        cells = [row.get(key, "") for key in ("family", "model", "capture", "rewritten", "chains")]
        cells.append(f"{row['share']:.3f}" if "share" in row else "")
        said = f"{said}: {why}".replace("|", "/") if why else said
        lines.append("| " + " | ".join(map(str, [*cells, *numbers, *seconds, said])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", choices=[*SOURCES], default="hf")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", nargs="+", type=Path, help="print the table of these files")
    arguments = parser.parse_args()
    if arguments.table:
        rows = [json.loads(line) for path in arguments.table for line in path.read_text().splitlines() if line]
        print(table(rows))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, make in SOURCES[arguments.source]():
        if not arguments.names or name in arguments.names:
            torch._dynamo.reset()
            print(json.dumps(survey(name, make)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
