"""Step time and bytes kept for backward of the reversible run over plain backprop of the same recurrence.

Both run interleaved in one process, and the ratio is that of each pair of steps; printed are medians and
quartiles.  The limit of the ratio is 4/3: a step is one forward and two forwards' worth of backward, and the
reversible run adds one forward.

    python benchmarks/eager.py [--device cuda] [--depth 24] [--rounds 15]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

import mfx
from mfx import kept_bytes
from mfx.memory import step_bytes


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, two residual adds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvBlock(nn.Module):
    """Two convolutions with batch norm, one residual add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward of ``model``."""

    def run() -> None:
        model(x).square().mean().backward()
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def seconds(run: Callable[[], None]) -> float:
    """How long ``run()`` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, model: nn.Module, x: Tensor, rounds: int) -> list[object]:
    """A row of the table: ratio of step times, and bytes of each, kept and alive."""
    stored = mfx.momentumize(model, 0.9, reversible=False)
    reversible = mfx.momentumize(model, 0.9)
    steps = step(reversible, x), step(stored, x)
    for run in steps * 2:
        run()
    ratios = [seconds(steps[0]) / seconds(steps[1]) for _ in range(rounds)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    sizes = [mebibytes(size) for mm in (stored, reversible) for size in (kept(mm, x), alive(mm, x))]
    return [name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", *sizes]


def kept(mm: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps for backward, counted by hooks: the prediction."""
    return kept_bytes(mm, [x], lambda: mm(x))[0]


def alive(mm: nn.Module, x: Tensor) -> int | None:
    """Bytes that are alive after a forward, by the allocator."""
    found = step_bytes(lambda: mm(x), lambda y: y.square().mean().backward(), x.device)
    return None if found is None else found.after_forward


def mebibytes(size: int | None) -> str:
    """A size for the table."""
    return "" if size is None else f"{size / 2**20:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depth", type=int, default=24, help="blocks in each stack")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    large = options.device != "cpu"
    transformer = nn.Sequential(*(TransformerBlock(1024 if large else 256) for _ in range(options.depth)))
    convolution = nn.Sequential(*(ConvBlock(256 if large else 64) for _ in range(options.depth)))
    tokens = torch.randn(16 if large else 4, 512 if large else 128, 1024 if large else 256)
    images = torch.randn(64 if large else 8, 256 if large else 64, 32, 32)
    rows = [
        measure("transformer blocks", transformer.to(options.device), tokens.to(options.device), options.rounds),
        measure("convolution blocks", convolution.to(options.device), images.to(options.device), options.rounds),
    ]
    where = torch.cuda.get_device_name() if large else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, depth {options.depth}, {options.rounds} rounds")
    headers = [
        "stack",
        "time, reversible / stored",
        "quartiles",
        "stored MiB: kept",
        "alive",
        "reversible MiB: kept",
        "alive",
    ]
    print(tabulate(rows, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
