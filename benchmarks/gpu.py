"""On a GPU: peak, step time and largest batch of three large models, bf16 autocast, eager and compiled.

ResNet-152, ViT-L/16 and a GPT-2 of medium size; plain, a checkpoint around every block, with and without offload, and
mfx at several budgets.  Peaks are the caching allocator's, with gradients there already; times are medians by CUDA
events, all ways of a model one after the other in each round; the largest batch is found by doubling and bisection over
real steps, each in this process, and beside it what ``mfx.fit`` predicts, where this mfx has it.

    python benchmarks/gpu.py [--models vit_l_16] [--rounds 10] [--compiled]
    python benchmarks/gpu.py --smoke          # tiny models, on the CPU: that it runs, not what it gives

The card's name stands above the tables and in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from figures import markdown
from peaks import step_bytes
from ways import NotHere, Way, checkpointed, name_of, offloaded, plain, rewritten
from zoo import Case, Sample, gpt2, vision

RESULTS = Path(__file__).parent / "results" / "gpu.json"

WAYS = (
    Way("plain", plain),
    Way("checkpoint", checkpointed),
    Way("checkpoint, offload", offloaded),
    Way("mfx, gamma 0.9", rewritten(0.9, None)),
    *(Way(name_of(gamma, budget), rewritten(gamma, budget)) for gamma in (0.9, 0.0) for budget in (0.0, 0.5)),
)
COMPILED = ("plain", "mfx, gamma 0.9")
"""The ways that are compiled as well."""


def models(smoke: bool) -> dict[str, tuple[Callable[[int], Sample], tuple[str, ...], int]]:
    """Each model by batch, the blocks that a checkpoint goes around, and the batch that is measured."""
    if smoke:
        return {
            "resnet18": (lambda batch: vision("resnet18", batch, 32), ("BasicBlock",), 2),
            "gpt2": (lambda batch: gpt2(2, 64, batch, 16), ("GPT2Block",), 2),
        }
    return {
        "resnet152": (lambda batch: vision("resnet152", batch, 224), ("Bottleneck",), 64),
        "vit_l_16": (lambda batch: vision("vit_l_16", batch, 224), ("EncoderBlock",), 64),
        "gpt2-medium": (lambda batch: gpt2(24, 1024, batch, 1024), ("GPT2Block",), 8),
    }


def on_device(sample: Sample, device: str) -> Sample:
    """The sample, moved."""
    inputs = {name: value.to(device) for name, value in sample.inputs.items()}
    return replace(sample, model=sample.model.to(device), inputs=inputs)


class Run:
    """One way to take a step of a model, under bf16 autocast."""

    def __init__(self, case: Case, way: Way, sample: Sample, device: str, compiled: bool = False) -> None:
        self.sample, self.device = sample, device
        with torch.autocast(device, torch.bfloat16):
            self.made = way.make(case, sample)
        self.model = torch.compile(self.made.model) if compiled else self.made.model

    def forward(self) -> tuple[Any, torch.Tensor]:
        with torch.autocast(self.device, torch.bfloat16):
            return self.sample.forward(self.model)

    def step(self) -> None:
        with self.made.around():
            output, loss = self.forward()
            loss.backward()
            del output

    def seconds(self) -> float:
        """How long a step takes, on the device's own clock."""
        if self.device != "cuda":
            start = time.perf_counter()
            self.step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    def peak(self) -> dict[str, int]:
        """The allocator's bytes, in a step in which gradients exist."""
        with self.made.around():
            found = step_bytes(self.forward, self.device)
        return {"after_forward": found.after_forward, "peak": found.peak}


def measure(
    name: str, make: Callable[[int], Sample], case: Case, batch: int, options: argparse.Namespace
) -> list[dict]:
    """The cells of a model."""
    sample = on_device(make(batch), options.device)
    runs, cells = {}, {}
    compiled = [(way, True) for way in WAYS if options.compiled and way.name in COMPILED]
    for way, compile in [*((way, False) for way in WAYS), *compiled]:
        title = f"{way.name}, compiled" if compile else way.name
        cell = cells[title] = {"model": name, "way": title, "batch": batch, "card": card(options.device)}
        try:
            if compile:
                torch._dynamo.reset()
            run = Run(case, way, sample, options.device, compile)
            run.step()
            run.step()
            cell.update(run.peak())
            if run.made.predicted is not None:
                cell["predicted"] = run.made.predicted
            runs[title] = run
        except NotHere as why:
            cell["not_here"] = str(why)
        except torch.OutOfMemoryError:
            cell["error"] = "out of memory"
    for title, seconds in interleaved(runs, options.rounds).items():
        cells[title]["seconds"] = seconds
    runs.clear()
    for way in WAYS:
        if options.batches and "not_here" not in cells[way.name]:
            cells[way.name]["largest_batch"] = largest(
                lambda size, way=way: fits(make, case, way, size, options), options
            )
    return list(cells.values())


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """The median seconds of each, in a new order each round."""
    taken: dict[str, list[float]] = {title: [] for title in runs}
    shuffle = random.Random(0)
    for _ in range(rounds):
        order = list(runs)
        shuffle.shuffle(order)
        for title in order:
            taken[title].append(runs[title].seconds())
    return {title: statistics.median(seconds) for title, seconds in taken.items()}


def fits(make: Callable[[int], Sample], case: Case, way: Way, batch: int, options: argparse.Namespace) -> bool:
    """Whether two steps of this batch run."""
    try:
        run = Run(case, way, on_device(make(batch), options.device), options.device)
        run.step()
        run.step()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        run = None
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def largest(works: Callable[[int], bool], options: argparse.Namespace) -> int:
    """The largest batch that works, to a sixteenth, at most ``--most``."""
    low, high = 0, 1
    while high <= options.most and works(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        if middle <= options.most and works(middle):
            low = middle
        else:
            high = middle
    return low


def card(device: str) -> str:
    """The device, by name."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = ("model", "batch", "way", "peak GiB", "of plain", "ms", "of plain", "largest batch")
    rows = []
    for cell in cells:
        plain_cell = next(one for one in cells if one["model"] == cell["model"] and one["way"] == "plain")
        row = [cell["model"], str(cell["batch"]), cell["way"]]
        for key, scale in (("peak", 2**30), ("seconds", 1e-3)):
            known = key in cell and key in plain_cell
            row += [f"{cell[key] / scale:.2f}", f"{cell[key] / plain_cell[key]:.2f}"] if known else ["-", "-"]
        rows.append([*row, str(cell.get("largest_batch") or "-")])
    return markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="some of them; all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compiled", action="store_true", help="compiled as well")
    parser.add_argument("--batches", action="store_true", help="look for the largest batch")
    parser.add_argument("--most", type=int, default=4096, help="the largest batch that is tried")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.device = "cpu" if options.smoke else "cuda"
    if options.smoke:
        options.rounds, options.most = 2, 4
    cells: list[dict[str, Any]] = []
    for name, (make, blocks, batch) in models(options.smoke).items():
        if not options.models or name in options.models:
            torch.manual_seed(0)
            case = Case(name, lambda make=make, batch=batch: make(batch), blocks)
            cells += measure(name, make, case, batch, options)
            gc.collect()
    print(f"{card(options.device)}, bf16 autocast\n\n{table(cells)}")
    if not options.smoke:
        options.out.write_text(json.dumps(cells, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(f"# On a GPU\n\n{card('cuda')}, bf16 autocast.\n\n{table(cells)}\n")


if __name__ == "__main__":
    main()
