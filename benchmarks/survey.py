"""Survey: which models of other libraries can be captured and rewritten, and are right afterwards.

One small model of every timm family, and tiny random configurations of Hugging Face architectures and of what people
run out of memory on (diffusion transformers, restoration, language models of other libraries: the extra ``survey``
has these), in float64 (float32 where its Python insists on that) and train mode with dropout alive.  For each model:

1. it is captured (fx, or Dynamo where fx cannot follow or the proof refuses what it gave) and rewritten;
2. at gamma = 0, outputs, gradients and buffers are compared with the original's under the same seed;
3. at gamma = 0.9, those of the reversible run with those of the stored run; and how many of the bytes that the
   original keeps for backward are kept;
4. the seconds until the first call has returned (``momentumize`` and a forward) and those of them that the proofs of
   its captures took; what a proof that refused said.

Usage: ``python benchmarks/survey.py [SOURCE] [NAME ...] [--table results.jsonl ...]``; prints one JSON object a model,
and with ``--table`` the Markdown table of earlier output.  Sources are below.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from survey_table import table
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

SOURCES = {
    "timm": "survey_timm",
    "hf": "survey_models",
    "more": "survey_more",
    "pictures": "survey_pictures",
    "detection": "survey_detection",
    "words": "survey_words",
    "sound": "survey_sound",
    "science": "survey_science",
}
"""The modules that have the models, each a dict ``MODELS`` of functions that give a model and its inputs by name."""


def survey(name: str, make: Callable[[], tuple[nn.Module, Any]]) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"family": name}
    torch.set_default_dtype(torch.float64)
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        model, inputs = make()
        row["model"] = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        row["dtype"], inputs = _as_precise_as_it_goes(model.train(), inputs)
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


def _as_precise_as_it_goes(model: nn.Module, inputs: Any) -> tuple[str, Any]:
    """Put the model in float64, or in float32 where its own Python insists on that; its inputs likewise."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor

    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)  # what the model makes in its forward is of the same dtype
        model.to(dtype)
        inputs = pytree.tree_map_only(Tensor, cast, inputs)
        try:
            _run(model, inputs)
        except RuntimeError as error:
            if dtype is torch.float32 or "loat" not in str(error):
                raise
        else:
            break
    return str(dtype).removeprefix("torch."), inputs


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _run(model: nn.Module, inputs: Any, returned: list[float] | None = None) -> list[list[Tensor]]:
    """Outputs, gradients of all parameters, buffers; the model is left as it is.  Notes when forward has returned."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
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
    for name, make in import_module(SOURCES[arguments.source]).MODELS.items():
        if not arguments.names or name in arguments.names:
            torch._dynamo.reset()
            print(json.dumps(survey(name, make)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
