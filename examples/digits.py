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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

import mfx
from mfx.memory import kept_bytes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "digits.png"
BATCH = 64
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
        norms = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        convolutions = [nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False) for _ in norms]
        self.branch = nn.Sequential(
            norms[0], nn.ReLU(), convolutions[0], norms[1], nn.ReLU(), nn.Dropout(0.1), convolutions[1]
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet(depth: int) -> nn.Sequential:
    """A stem and two stages of ``depth`` blocks each, on pictures of 8 and of 4 pixels a side."""
    narrow, wide = ([Block(width) for _ in range(depth)] for width in (16, 32))
    stem, down = nn.Conv2d(1, 16, kernel_size=3, padding=1), nn.Conv2d(16, 32, kernel_size=2, stride=2)
    tail = nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return nn.Sequential(stem, *narrow, down, *wide, *tail)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pictures, test pictures, training labels, test labels: three quarters and one quarter."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8).astype("float32") / 16
    first, second, third, fourth = train_test_split(images, labels, stratify=labels, random_state=0)
    return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(third), torch.from_numpy(fourth)


def train(models: Mapping[str, nn.Module], data: tuple[Tensor, ...], epochs: int, seed: int) -> dict[str, list[float]]:
    """Train the models in place, step by step in turn; the seconds that each step took."""
    images, _, labels, _ = data
    order = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(epochs) for batch in torch.randperm(len(images), generator=order).split(BATCH)[:-1]]
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for name, model in models.items()}
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=len(batches))
        for optimizer in optimizers.values()
    ]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step, batch in enumerate(batches):
        for name, model in models.items():
            torch.manual_seed(10_000 * seed + step)  # the same dropout masks for each
            start = time.perf_counter()
            optimizers[name].zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
        for schedule in schedules:
            schedule.step()
    return seconds


def compare(seeds: int, epochs: int, depth: int, gamma: float, console: Console) -> dict[str, Results]:
    """Train the three networks from every seed."""
    data = digits()
    images, test_images, labels, test_labels = data
    results = {name: Results() for name in COLOURS}
    for seed in range(seeds):
        torch.manual_seed(seed)
        plain = resnet(depth)
        stored = mfx.momentumize(copy.deepcopy(plain), gamma=gamma, reversible=False)
        models = {PLAIN: plain, STORED: stored, REVERSIBLE: mfx.momentumize(copy.deepcopy(plain), gamma=gamma)}
        seconds = train(models, data, epochs, seed)
        for name, model in models.items():
            batch = images[:BATCH], labels[:BATCH]
            result = results[name]
            result.kept, _ = kept_bytes(model, batch, lambda m=model, b=batch: cross_entropy(m(b[0]), b[1]))
            with torch.no_grad():
                result.predictions.append(model.eval()(test_images).argmax(dim=1))
            result.accuracies.append((result.predictions[-1] == test_labels).double().mean().item())
            result.weights.append(parameters_to_vector(model.parameters()).detach())
            result.seconds += seconds[name]
        scores = ", ".join(f"{name} {result.accuracies[-1]:.2%}" for name, result in results.items())
        console.print(f"seed {seed}: {scores}", highlight=False)
    return results


def standard_error(values: list[float]) -> float:
    """Of the mean; of one value alone it is not known."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def show(results: dict[str, Results], console: Console) -> None:
    """The table, and what follows from it."""
    table = Table("network", "test accuracy", "kept for backward", "time a step", "against ResNet")
    base = median(results[PLAIN].seconds)
    for name, result in results.items():
        score = f"{mean(result.accuracies):.2%} ± {standard_error(result.accuracies):.2%}"
        step = median(result.seconds)
        table.add_row(name, score, f"{result.kept / 2**20:.2f} MiB", f"{1e3 * step:.1f} ms", f"{step / base:.2f}x")
    console.print(table)

    pairs = zip(results[REVERSIBLE].accuracies, results[PLAIN].accuracies, strict=True)
    differences = [ours - plain for ours, plain in pairs]
    gap, error = mean(differences), standard_error(differences)
    verdict = "within" if abs(gap) <= error else "NOT within"
    console.print(
        f"Momentum, reversible - ResNet: {100 * gap:+.2f} ± {100 * error:.2f} points; {verdict} one standard error "
        f"of the difference (mean over {len(differences)} seeds, paired)"
    )
    stored, reversible = results[STORED], results[REVERSIBLE]
    distances = [float((a - b).norm() / b.norm()) for a, b in zip(reversible.weights, stored.weights, strict=True)]
    differing = sum(int((a != b).sum()) for a, b in zip(reversible.predictions, stored.predictions, strict=True))
    total = sum(len(prediction) for prediction in stored.predictions)
    console.print(
        f"reversible and stored after training: weights {min(distances):.0e} to {max(distances):.0e} apart (relative); "
        f"{differing} of {total} test predictions differ"
    )


def draw(results: dict[str, Results], path: Path) -> None:
    """Accuracies of all seeds beside bytes and time."""
    names, colours = list(results), list(COLOURS.values())
    ticks = range(len(names))
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), width_ratios=(1.5, 1, 1), layout="constrained")
    columns = [[100 * value for value in result.accuracies] for result in results.values()]
    for scores in zip(*columns, strict=True):
        axes[0].plot(ticks, scores, color="#c8ccd2", linewidth=1, zorder=1)
    for tick, column, colour in zip(ticks, columns, colours, strict=True):
        axes[0].scatter([tick] * len(column), column, color=colour, alpha=0.5, s=28, zorder=2)
        axes[0].errorbar(tick + 0.16, mean(column), standard_error(column), color=colour, fmt="D", capsize=5, zorder=3)
        axes[0].annotate(f"{mean(column):.2f} %", (tick + 0.24, mean(column)), va="center", color=colour)
    axes[0].set(title="Test accuracy, one line a seed", ylabel="test accuracy (%)", xlim=(-0.3, 2.75))
    base = median(results[PLAIN].seconds)
    panels = {
        "Kept for backward": ("MiB", [result.kept / 2**20 for result in results.values()], "{:.2f}"),
        "Time a step": ("relative to the ResNet", [median(r.seconds) / base for r in results.values()], "{:.2f}x"),
    }
    for axis, (title, (label, values, form)) in zip(axes[1:], panels.items(), strict=True):
        axis.bar_label(axis.bar(ticks, values, color=colours, width=0.65), fmt=form, padding=2)
        axis.set(title=title, ylabel=label, ylim=(0, 1.15 * max(values)))
    for axis in axes:
        axis.set_xticks(ticks, [name.replace(", ", "\n") for name in names])
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="A ResNet and its momentum version from scratch on digits.")
    parser.add_argument("--quick", action="store_true", help="two seeds of one epoch, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    parser.add_argument("--gamma", type=float, default=0.9, help="momentum; 0 is the plain network")
    options = parser.parse_args()
    seeds, epochs, depth = (2, 1, 2) if options.quick else (5, 8, 4)

    console = Console(width=120)
    results = compare(seeds, epochs, depth, options.gamma, console)
    show(results, console)
    draw(results, options.out)
    console.print(f"picture: {options.out}", highlight=False)


if __name__ == "__main__":
    main()
