"""Compiled step time, bytes and compile time of a momentumized stack over compiled plain backprop.

Bytes are those kept for backward, counted by hooks, and those alive after a forward, by the allocator.

Steps of both run interleaved in one process, and the ratio is that of each pair; printed are median and quartiles.
What is aimed at: a step of 1.34, and compile times of 1.0, 0.7 and 0.5 at depths 12, 24 and 48.  Compile times are one
compilation each of forward and backward, inductor's caches off, after one small compilation that wakes the toolchain.

    python benchmarks/compile.py [--device cuda] [--depths 12 24 48] [--rounds 15] [--backend aot_eager]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

import mfx
from mfx import kept_bytes
from mfx.memory import step_bytes


class Block(nn.Module):
    """A pre-norm MLP with dropout, one residual add."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(p), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def stack(depth: int, width: int, p: float, device: str) -> nn.Module:
    """``depth`` blocks."""
    return nn.Sequential(*(Block(width, p) for _ in range(depth))).to(device)


def step(net: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The seconds of one forward and backward."""
    start = time.perf_counter()
    net(x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(depth: int, options: argparse.Namespace) -> list[object]:
    """A row of the table."""
    x = torch.randn(options.rows, options.width, device=options.device)
    plain, pure = (stack(depth, options.width, options.dropout, options.device) for _ in range(2))
    nets = [
        torch.compile(plain, backend=options.backend, fullgraph=True),
        torch.compile(pure, backend=mfx.backend(0.9, options.backend), fullgraph=True),
    ]
    compiling = [step(net, x) for net in nets]
    ratios = []
    for _ in range(options.rounds + 2):
        seconds = [step(net, x) for net in nets]
        ratios.append(seconds[1] / seconds[0])
    low, middle, high = statistics.quantiles(ratios[2:], n=4)
    models = (plain, pure)
    kept = [kept_bytes(model, [x], lambda net=net: net(x))[0] / 2**20 for model, net in zip(models, nets, strict=True)]
    steps = [step_bytes(lambda net=net: net(x), lambda y: y.square().mean().backward(), x.device) for net in nets]
    alive = ["" if found is None else f"{found.after_forward / 2**20:.2f}" for found in steps]
    sizes = f"{kept[0]:.2f}", alive[0], f"{kept[1]:.2f}", alive[1]
    times = f"{compiling[0]:.1f}", f"{compiling[1]:.1f}", f"{compiling[1] / compiling[0]:.2f}"
    return [depth, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", *sizes, *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.force_disable_caches = True
    wake = torch.compile(stack(1, 8, 0.0, options.device), backend=options.backend)
    step(wake, torch.randn(4, 8, device=options.device))
    rows = []
    for depth in options.depths:
        torch._dynamo.reset()
        rows.append(measure(depth, options))
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {options.backend}, dropout {options.dropout}, {options.rounds} rounds")
    headers = [
        "depth",
        "step, momentum / plain",
        "quartiles",
        "plain MiB: kept",
        "alive",
        "momentum MiB: kept",
        "alive",
    ]
    print(tabulate(rows, [*headers, "compile plain s", "momentum s", "ratio"], disable_numparse=True))


if __name__ == "__main__":
    main()
