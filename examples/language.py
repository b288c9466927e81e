"""A small language model from scratch, by four rules: plain, momentum, midpoint and leapfrog.

A decoder (pre-norm, causal attention and MLP, dropout alive) learns to foresee the next character of Python's standard
library.  The plain network and its three reversible versions have the same weights at the start, the same batches and
dropout masks; all compute under bfloat16 autocast.  What is shown is the loss on held-out files, the bytes kept for
backward, and the time of a step, which the networks take in turn.

Midpoint begins with an Euler step (``velocity="first"``); leapfrog's step is small, since its velocity sums up all
branches.

Reference: Sander et al., ICML 2021, arXiv 2102.07870 (momentum); Gal et al., arXiv 2512.02056 (midpoint and leapfrog
language models).
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from rich.progress import track
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import mfx

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "language.png"
WIDTH, HEADS, LENGTH, BATCH, RATE = 128, 4, 64, 16, 1e-3
WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "momentum, gamma 0.9": {"gamma": 0.9},
    "midpoint": {"rule": "midpoint", "velocity": "first"},
    "leapfrog, h 0.3": {"rule": "leapfrog", "h": 0.3},
}
COLOURS = dict(zip(WAYS, ("#22313f", "#3366cc", "#2a9d8f", "#d1662f"), strict=True))


class Layer(nn.Module):
    """Attention, then an MLP, each added to x."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.drop = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norms[0](x)))
        return x + self.drop(self.down(torch.nn.functional.gelu(self.up(self.norms[1](x)))))


class Decoder(nn.Module):
    """Characters to the logits of the next one."""

    def __init__(self, characters: int, depth: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(*[Layer() for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(text) + self.place)))


class Run:
    """One network in training, and what came of it."""

    def __init__(self, options: dict[str, Any] | None, characters: int, depth: int, steps: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Decoder(characters, depth)
        if options is not None:
            self.model = mfx.momentumize(self.model, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.rates = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, RATE, total_steps=steps)
        self.seconds, self.kept, self.losses = list[float](), 0, dict[int, float]()

    def step(self, text: Tensor) -> None:
        """One training step."""
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            if self.kept == 0:
                self.kept, logits = mfx.kept_bytes(self.model.train(), [text], lambda: self.model(text[:, :-1]))
            else:
                logits = self.model.train()(text[:, :-1])
        cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def test(self, step: int, parts: list[Tensor]) -> None:
        """The mean loss of a character, in nats."""
        self.model.eval()
        found = [cross_entropy(self.model(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten()).item() for t in parts]
        self.losses[step] = sum(found) / len(found)


def library(pattern: str) -> Tensor:
    """The standard library's files as one text of bytes below 128."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob(pattern))
    text = b"".join(path.read_bytes() for path in paths)
    return torch.tensor(list(text), dtype=torch.uint8).clamp(max=127).long()


def cut(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """That many pieces from anywhere."""
    starts = torch.randint(len(text) - LENGTH - 1, (count,), generator=generator)
    return torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])


def train(depth: int, steps: int, pattern: str) -> dict[str, Run]:
    """All networks, step by step in turn."""
    text, generator = library(pattern), torch.Generator().manual_seed(0)
    text, held_out = text[: 9 * len(text) // 10], text[9 * len(text) // 10 :]
    tests = [cut(held_out, 64, generator) for _ in range(8 if depth > 2 else 1)]
    runs = {name: Run(options, 128, depth, steps) for name, options in WAYS.items()}
    for step in track(range(steps + 1), "training"):
        batch = cut(text, BATCH, generator)
        for run in runs.values():
            if step % max(1, steps // 10) == 0:
                run.test(step, tests)
            if step < steps:
                torch.manual_seed(step)  # the same dropout masks for each
                run.step(batch)
    return runs


def draw(runs: dict[str, Run], path: Path) -> None:
    """Loss against steps, and bytes kept."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1.5, 1), layout="constrained")
    for name, run in runs.items():
        left.plot(list(run.losses), list(run.losses.values()), color=COLOURS[name], label=name, linewidth=2)
    left.set(title="Loss on held-out files", xlabel="training step", ylabel="nats a character")
    left.legend(frameon=False)
    kept = [run.kept / 2**20 for run in runs.values()]
    bars = right.barh(list(runs), kept, color=[COLOURS[name] for name in runs])
    right.bar_label(bars, [f"{size:.1f} MiB" for size in kept], padding=3)
    right.set(title="Kept for backward", xlabel="MiB", xlim=(0, 1.25 * max(kept)))
    right.invert_yaxis()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model by four rules.")
    parser.add_argument("--quick", action="store_true", help="two layers, two steps, to see that it runs")
    parser.add_argument("--depth", type=int, default=8, help="layers, of two residual adds each")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    options = parser.parse_args()
    depth, steps, pattern = (2, 2, "a*.py") if options.quick else (options.depth, options.steps, "*.py")
    runs = train(depth, steps, pattern)
    plain = median(runs["plain"].seconds)
    rows = [
        {
            "rule": name,
            "loss, nats": f"{list(run.losses.values())[-1]:.3f}",
            "kept for backward, MiB": f"{run.kept / 2**20:.2f}",
            "time a step": f"{median(run.seconds) / plain:.2f}",
        }
        for name, run in runs.items()
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    draw(runs, options.out)
    print(f"{depth} layers, {steps} steps; picture: {options.out}")


if __name__ == "__main__":
    main()
