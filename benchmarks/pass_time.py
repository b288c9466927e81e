"""How long the pass takes: reports and conversions of graphs of 10,000 nodes, and of a UNet that Dynamo captures.

1. *Stacks* of n blocks in several forms: a plain chain, one whose states are all handed out (taps), one whose branches
   read values from beside it (sides), one in which every block adds the same far skip, one with all of these.  Each is
   reported and momentumized at n and at 2 n blocks; a pass that is linear takes twice as long for the second.
2. A *UNet* with residual and transformer blocks, time embeddings, cross-attention and long skips, of the structure of
   diffusers' ``UNet2DConditionModel``, captured by Dynamo: the seconds within Dynamo, and those of mfx itself.

    python benchmarks/pass_time.py [--nodes 10000] [--forms far] [--unets 1 4] [--profile far]
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import platform
import pstats
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from unet import UNet

import mfx
from mfx.torch_versions import dynamo
from mfx.view.reporting import report

RESULTS = Path(__file__).parent / "results" / "pass_time.json"
FORMS = ("chain", "taps", "sides", "far", "all")
"""What the blocks of a stack do beside ``x + f(x)``."""


class Branch(nn.Module):
    """A small residual branch of four operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """``depth`` blocks in a ``form`` of :data:`FORMS`."""

    def __init__(self, depth: int, form: str, width: int = 8) -> None:
        super().__init__()
        self.stem, self.side = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Branch(width) for _ in range(depth))
        self.form = form

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        x = far = self.stem(x)
        side = self.side(mask)
        taps = []
        for block in self.blocks:
            h = block(x)
            if self.form in ("sides", "all"):
                h = h * side + mask
            if self.form in ("far", "all"):
                h = h + far
            x = x + h
            if self.form in ("taps", "all"):
                taps.append(x)
        return (x, *taps)


def stack(nodes: int, form: str) -> nn.Module:
    """A stack in a ``form`` of about that many nodes."""
    a_block = 5 + (form in ("sides", "all")) * 2 + (form in ("far", "all"))
    return Stack(nodes // a_block, form)


def seconds(run: Callable[[], Any]) -> float:
    """How long ``run()`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_stack(nodes: int, form: str) -> dict[str, Any]:
    """The seconds of report and conversion at about ``nodes`` and half of them."""
    row: dict[str, Any] = {"form": form}
    for size in (nodes // 2, nodes):
        model = stack(size, form)
        row[f"report {size}"] = seconds(lambda model=model: report(model))
        row[f"momentumize {size}"] = seconds(lambda model=model: mfx.momentumize(model))
    return row


def measure_unet(depth: int) -> dict[str, Any]:
    """Seconds of a momentumization of the UNet by Dynamo: in Dynamo for the same call alone, and in all."""
    model = UNet(depths=(depth, depth, depth, 0))
    inputs = model.example()
    nodes, ends = [0], [0.0]

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        nodes[0], ends[0] = len(gm.graph.nodes), time.perf_counter()
        return gm.forward

    torch.compile(nn.Linear(2, 2), backend=count)(torch.ones(1, 2))  # imports Dynamo
    torch._dynamo.reset()
    start = time.perf_counter()
    torch.compile(model, backend=count, fullgraph=True)(*inputs)
    alone = ends[0] - start
    torch._dynamo.reset()
    with _timed(dynamo(), "fullgraph_capture") as spent:
        whole = seconds(lambda: mfx.momentumize(model, example_inputs=inputs, capture="dynamo"))
    inside = sum(spent)
    return {"unet": depth, "nodes": nodes[0], "Dynamo alone": alone, "momentumize": whole, "of it Dynamo": inside}


@contextlib.contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Notes the seconds of each call of a function."""
    original, spent = getattr(owner, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    try:
        yield spent
    finally:
        setattr(owner, name, original)


def profile(nodes: int, form: str) -> None:
    """Print where the time of a conversion goes."""
    model = stack(nodes, form)
    profiler = cProfile.Profile()
    profiler.runcall(mfx.momentumize, model)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("mfx|networkx|fx", 45)


def machine() -> str:
    """Where this runs, in words."""
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def page(found: dict[str, Any]) -> str:
    """The tables."""
    stacks = [
        [row["form"], *(f"{value:.1f}" for key, value in row.items() if key != "form")] for row in found["stacks"]
    ]
    heads = [key for key in found["stacks"][0] if key != "form"] if stacks else []
    parts = ("Dynamo alone", "momentumize", "of it Dynamo")
    unets = [[row["nodes"], *(f"{row[key]:.1f}" for key in parts)] for row in found["unets"]]
    return (
        "\n\n".join(
            [
                "# Pass time",
                f"Written by `python benchmarks/pass_time.py`; {found['machine']}. Seconds of `mfx.report` and "
                "`mfx.momentumize` of stacks of about that many nodes, their capture by symbolic tracing included.",
                tabulate(stacks, headers=["form", *heads], tablefmt="github", disable_numparse=True),
                "A UNet of the structure of `UNet2DConditionModel`, captured by Dynamo: seconds of Dynamo alone "
                "for it, of `mfx.momentumize` in all, and of Dynamo in it (the whole, then each owner of chains).",
                tabulate(unets, headers=["nodes", *parts], tablefmt="github", disable_numparse=True),
            ]
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=FORMS)
    parser.add_argument("--unets", type=int, nargs="*", default=[1, 4], help="transformer blocks a stage")
    parser.add_argument("--profile", choices=FORMS, help="print where the time goes instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.profile:
        profile(options.nodes, options.profile)
        return
    found: dict[str, Any] = {"machine": machine(), "stacks": [], "unets": []}
    for form in options.forms:
        found["stacks"].append(measure_stack(options.nodes, form))
        print(json.dumps(found["stacks"][-1]), flush=True)
    for depth in options.unets:
        found["unets"].append(measure_unet(depth))
        print(json.dumps(found["unets"][-1]), flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
