"""Train a ResNet and a Momentum ResNet from scratch on handwritten digits: same accuracy, less memory?

For each of five seeds three networks start from the same weights and see the same batches and dropout masks:

- the plain ResNet;
- its momentum version with stored activations (``reversible=False``), another model: what differs is the accuracy;
- its momentum version that recomputes them, the same model again: what differs is rounding, memory and time.

Batch norm and dropout are alive throughout.  The three take turns step by step, so that a busy machine slows all alike.

Reference: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from operator import sub
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

import mfx

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "digits.png"
BATCH, GAMMA = 64, 0.9
COLOURS = {"ResNet": "#56606e", "Momentum, stored": "#d1781f", "Momentum, reversible": "#1f7a8c"}
PLAIN, STORED, REVERSIBLE = COLOURS


@dataclass
class Results:
    """What one kind of network did, over the seeds."""

    accuracies: list[float] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: int = 0


class Block(nn.Module):
    """A residual block: two convolutions, each after a batch norm, with dropout between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        opening, middle = ((nn.BatchNorm2d(width), nn.ReLU()) for _ in range(2))
        self.branch = nn.Sequential(*opening, first, *middle, nn.Dropout(0.1), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet(depth: int) -> nn.Sequential:
    """A stem and two stages of ``depth`` blocks each, on pictures of 8 and of 4 pixels a side."""
    narrow, wide = ([Block(width) for _ in range(depth)] for width in (16, 32))
    stem, down = nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.Conv2d(16, 32, kernel_size=2, stride=2)
    tail = nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return nn.Sequential(stem, *narrow, down, *wide, *tail)


def digits() -> tuple[Tensor, ...]:
    """Training pictures, test pictures, training labels, test labels: three quarters and one quarter."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8).astype("float32") / 16
    return tuple(map(torch.from_numpy, train_test_split(images, labels, stratify=labels, random_state=0)))


def networks(seed: int, depth: int, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """The three networks; momentumize shares parameters with what it is given, so each gets a copy."""
    torch.manual_seed(seed)
    plain = resnet(depth).to(dtype)
    stored = mfx.momentumize(copy.deepcopy(plain), gamma=GAMMA, reversible=False)
    return {PLAIN: plain, STORED: stored, REVERSIBLE: mfx.momentumize(copy.deepcopy(plain), gamma=GAMMA)}


def train(models: dict[str, nn.Module], images: Tensor, labels: Tensor, epochs: int, seed: int) -> list[list[float]]:
    """Train the models in place, step by step in turn; for each, the seconds of its steps."""
    order = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images), generator=order).split(BATCH)[:-1]]
    optimizers = [SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for model in models.values()]
    schedules = [OneCycleLR(optimizer, 0.1, total_steps=len(batches)) for optimizer in optimizers]
    seconds: list[list[float]] = [[] for _ in models]
    for step, batch in enumerate(batches):
        for model, optimizer, schedule, spent in zip(models.values(), optimizers, schedules, seconds, strict=True):
            torch.manual_seed(10_000 * seed + step)  # the same dropout masks for each
            start = time.perf_counter()
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            spent.append(time.perf_counter() - start)
            schedule.step()
    return seconds


def compare(seeds: int, epochs: int, depth: int) -> dict[str, Results]:
    """Train the three networks from every seed."""
    images, test_images, labels, test_labels = digits()
    results = {name: Results() for name in COLOURS}
    for seed in track(range(seeds), "training from each seed"):
        models = networks(seed, depth)
        seconds = train(models, images, labels, epochs, seed)
        for model, spent, result in zip(models.values(), seconds, results.values(), strict=True):
            result.kept = kept(model, images[:BATCH])
            with torch.no_grad():
                result.predictions.append(model.eval()(test_images).argmax(dim=1))
            result.accuracies.append(100 * (result.predictions[-1] == test_labels).double().mean().item())
            result.weights.append(parameters_to_vector(model.parameters()).detach())
            result.seconds += spent
    return results


def kept(model: nn.Module, images: Tensor) -> int:
    """Bytes that a training forward keeps for backward; of a copy, because it moves the batch norm's statistics."""
    twin = copy.deepcopy(model).train()
    return mfx.kept_bytes(twin, [images], lambda: twin(images))[0]


def distance_in_float64(epochs: int, depth: int) -> float:
    """How far apart the weights of the stored and the reversible run end when rounding is all but taken away."""
    images, _, labels, _ = digits()
    models = networks(0, depth, torch.float64)
    del models[PLAIN]
    train(models, images.double(), labels, epochs, seed=0)
    return distance(*(parameters_to_vector(model.parameters()).detach() for model in models.values()))


def distance(a: Tensor, b: Tensor) -> float:
    """The relative distance."""
    return float((a - b).norm() / a.norm())


def standard_error(values: list[float]) -> float:
    """The standard error of the mean."""
    return stdev(values) / len(values) ** 0.5


def show(results: dict[str, Results], in_float64: float, console: Console) -> None:
    """The table, and what follows from it."""
    table = Table("network", "test accuracy", "kept for backward", "time a step", "against ResNet")
    plain, stored, reversible = results.values()
    for name, result in results.items():
        score = f"{mean(result.accuracies):.2f} ± {standard_error(result.accuracies):.2f} %"
        step, ratio = median(result.seconds), median(result.seconds) / median(plain.seconds)
        table.add_row(name, score, f"{result.kept / 2**20:.2f} MiB", f"{1e3 * step:.1f} ms", f"{ratio:.2f}x")
    console.print(table)
    for name in (STORED, REVERSIBLE):
        differences = list(map(sub, results[name].accuracies, plain.accuracies))
        gap, error = mean(differences), standard_error(differences)
        verdict = "within" if abs(gap) <= error else "more than"
        console.print(f"{name} - ResNet: {gap:+.2f} ± {error:.2f} points, {verdict} one standard error (by seed)")
    distances = list(map(distance, stored.weights, reversible.weights))
    differing = sum(int((a != b).sum()) for a, b in zip(stored.predictions, reversible.predictions, strict=True))
    console.print(
        f"Reversible and stored after training: {differing} of {sum(map(len, stored.predictions))} test predictions "
        f"differ, weights {min(distances):.0e} to {max(distances):.0e} apart (relative); in float64 {in_float64:.0e}"
    )


def draw(results: dict[str, Results], path: Path) -> None:
    """Accuracies of all seeds beside bytes and time."""
    runs, ticks, colours = list(results.values()), range(len(results)), list(COLOURS.values())
    figure, (left, *others) = plt.subplots(1, 3, figsize=(11, 4), width_ratios=(1.5, 1, 1), layout="constrained")
    left.plot(ticks, [run.accuracies for run in runs], color="#d5d9de", linewidth=1, zorder=1)
    for tick, run, colour in zip(ticks, runs, colours, strict=True):
        centre = mean(run.accuracies)
        left.scatter([tick] * len(run.accuracies), run.accuracies, color=colour, alpha=0.5, s=28, zorder=2)
        left.errorbar(tick + 0.15, centre, standard_error(run.accuracies), color=colour, fmt="D", capsize=5)
        left.annotate(f"{centre:.2f} %", (tick + 0.23, centre), va="center", color=colour)
    left.set(title=f"Accuracy of {len(runs[0].accuracies)} seeds, mean and standard error", xlim=(-0.3, 2.75))
    left.set_ylabel("test accuracy (%)")
    seconds = [median(run.seconds) for run in runs]
    bars = [run.kept / 2**20 for run in runs], [each / seconds[0] for each in seconds]
    labels = ("Kept for backward", "MiB", "{:.2f}"), ("Time a step", "relative to the ResNet", "{:.2f}x")
    for axis, heights, (title, label, form) in zip(others, bars, labels, strict=True):
        axis.bar_label(axis.bar(ticks, heights, color=colours, width=0.65), fmt=form, padding=2)
        axis.set(title=title, ylabel=label, ylim=(0, 1.15 * max(heights)))
    for axis in (left, *others):
        axis.set_xticks(ticks, [name.replace(", ", "\n") for name in results])
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="A ResNet and its momentum version from scratch on digits.")
    parser.add_argument("--quick", action="store_true", help="two seeds of one epoch, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    options = parser.parse_args()
    seeds, epochs, depth = (2, 1, 1) if options.quick else (5, 8, 4)

    console = Console(width=120, highlight=False)
    results = compare(seeds, epochs, depth)
    show(results, distance_in_float64(epochs, depth), console)
    draw(results, options.out)
    console.print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
