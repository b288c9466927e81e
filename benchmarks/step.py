"""Memory and time of a training step: mfx beside what a user would pick.  One command measures, and makes the tables.

1. *Peaks*: each (case, way) in a process of its own: a step to warm up, a step that creates the gradients (their bytes
   taken off), and a step in which they exist already, by the allocator (:mod:`peaks`); for budgets also what the plan
   predicted.
2. *Times*: all ways of a case in one process, in a new random order each round; what counts is the ratio to the plain
   step of the same round, its median and quartiles.
3. Every figure is kept in ``results/step.json`` with the machine it was measured on; what is measured anew takes the
   place of what was there.  ``figures.py`` makes the tables and the picture from it.

    python benchmarks/step.py                                  # all of it
    python benchmarks/step.py --cases 'transformer *' --ways plain checkpoint 'mfx*' --what peaks
    python benchmarks/step.py --what tables                    # nothing is measured
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from figures import write_all
from peaks import step_bytes
from ways import WAYS, Made, NotHere, Way, chosen
from zoo import CASES, Case, Sample

RESULTS = Path(__file__).parent / "results" / "step.json"
TIMED = (
    "mlp 24",
    "convolution 24",
    "transformer *",
    "resnet50",
    "vit_b_16",
    "swin_t",
    "convnext_tiny",
    "gpt2",
    "llama*",
)
"""The cases whose steps are timed."""


def prepare(case: Case, way: Way | None, seed: int = 0) -> tuple[Sample, Made | None]:
    """The sample of a case, and what ``way`` makes of it."""
    torch.manual_seed(seed)
    sample = case.make()
    return sample, None if way is None else way.make(case, sample)


def stepper(case: Case, sample: Sample, made: Made) -> Callable[[], None]:
    """One training step: as many forwards and backwards as the case has calls."""

    def run() -> None:
        with made.around():
            for _ in range(case.calls):
                sample.step(made.model)

    return run


def peak_cell(names: tuple[str, str], threads: int) -> dict[str, Any]:
    """The bytes of one (case, way), measured in this process."""
    torch.set_num_threads(threads)
    case, way = _named(*names)
    cell: dict[str, Any] = {"case": case.name, "way": way.name}
    try:
        sample, made = prepare(case, way)
    except NotHere as why:
        return {**cell, "not_here": str(why)}
    assert made is not None
    run = stepper(case, sample, made)
    run()
    tensors = [*sample.model.parameters(), *(v for v in sample.inputs.values() if v.requires_grad)]
    for tensor in tensors:
        tensor.grad = None
    with made.around():
        first = step_bytes(lambda: sample.forward(made.model))
        gradients = sum(tensor.grad.untyped_storage().nbytes() for tensor in tensors if tensor.grad is not None)
        for _ in range(case.calls - 1):
            sample.step(made.model)
        again = step_bytes(lambda: sample.forward(made.model))
    cell |= {"after_forward": again.after_forward, "peak": again.peak, "left": again.left}
    cell |= {"first_step": first.peak - gradients, "gradients": gradients}
    if made.predicted is not None:
        cell |= {"predicted": made.predicted, "where": made.where}
    return cell


def _named(case: str, way: str) -> tuple[Case, Way]:
    return next(one for one in CASES if one.name == case), next(one for one in WAYS if one.name == way)


def peaks(pairs: list[tuple[Case, Way]], workers: int) -> Iterator[dict[str, Any]]:
    """The cells of ``pairs``; each process is a fork of a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "mfx", "zoo", "ways", "peaks", "torchvision", "transformers"])
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = [(pair, pool.submit(_peak_or_error, (pair[0].name, pair[1].name), threads)) for pair in pairs]
        for _, future in waiting:
            yield future.result()


def _peak_or_error(names: tuple[str, str], threads: int) -> dict[str, Any]:
    try:
        return peak_cell(names, threads)
    except Exception as error:  # the cell says what went wrong, and the table shows it
        return {"case": names[0], "way": names[1], "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def times(case: Case, ways: list[Way], rounds: int) -> Iterator[dict[str, Any]]:
    """The ratios of step times to plain's, all ways interleaved on one model."""
    sample, _ = prepare(case, None)
    runs: dict[str, Callable[[], None]] = {}
    for way in ways:
        try:
            runs[way.name] = stepper(case, sample, way.make(case, sample))
            for _ in range(2):
                runs[way.name]()
        except NotHere:
            continue
        except Exception as error:
            yield {
                "case": case.name,
                "way": way.name,
                "error": f"{type(error).__name__}: {error}".splitlines()[0][:200],
            }
            runs.pop(way.name, None)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(0)
    for _ in range(rounds):
        order = list(runs)
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        ratios = [one / base for one, base in zip(seconds, taken["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        found = {"ratio": middle, "quartiles": [low, high], "seconds": statistics.median(seconds), "rounds": rounds}
        yield {"case": case.name, "way": name, **found}


def machine() -> str:
    """Where this runs, in words."""
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


class Store:
    """The JSON of all results: ``peaks`` and ``times``, by case and way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"peaks": {}, "times": {}}

    def put(self, kind: str, cell: dict[str, Any]) -> None:
        """Put in one cell, and write the file."""
        key = f"{cell['case']} | {cell['way']}"
        self.data[kind][key] = {**cell, "machine": machine()}
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        shown = {name: value for name, value in cell.items() if name not in ("case", "way")}
        print(f"{kind:6} {key}: {json.dumps(shown)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[], help="patterns of cases; all")
    parser.add_argument("--ways", nargs="+", default=[], help="patterns of ways; all")
    parser.add_argument("--what", nargs="+", choices=["peaks", "times", "tables"], default=["peaks", "times", "tables"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, for peaks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = Store(options.out)
    cases, ways = chosen(CASES, options.cases), chosen(WAYS, options.ways)
    if "peaks" in options.what:
        pairs = [(case, way) for case in cases for way in ways if way.takes(case)]
        for cell in peaks(pairs, options.workers):
            store.put("peaks", cell)
    if "times" in options.what:
        if WAYS[0] not in ways:
            ways = [WAYS[0], *ways]
        for case in chosen(cases, TIMED):
            for cell in times(case, [way for way in ways if way.takes(case)], options.rounds):
                store.put("times", cell)
    if "tables" in options.what:
        write_all(store.data)


if __name__ == "__main__":
    sys.exit(main())
