"""A training step of a model that FSDP2 shards by block, in two processes: mfx beside torch's checkpoint under FSDP2.

1. Each way is measured in the same two processes (gloo, on the CPU): two steps to warm up, nine for the bytes
   (:mod:`peaks`), one for the collectives (``CommDebugMode``).  Threads of gloo let go of what was gathered when they
   come to it, so that peaks differ from step to step: the table has the median, the least and the most.
2. Bytes are those of the process that has more, above what is there before the step (parameters and gradients, sharded,
   are there already); whole parameters and whole gradients, while they are alive, are in it.
3. All of it is written to ``results/sharded.md``, with the machine.

    OMP_NUM_THREADS=1 python benchmarks/sharded.py [--depth 12] [--width 256]
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from peaks import step_bytes
from tabulate import tabulate
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

import mfx

RESULTS = Path(__file__).parent / "results" / "sharded.md"
TOKENS, BATCH, STEPS = 64, 8, 9


class Layer(nn.Module):
    """Attention and MLP, two residual adds, as one block that is sharded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """Layers between two linear maps."""

    checkpointed = False

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(32, width), nn.Linear(width, 32)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.head(x)


class Checkpointed(Model):
    """A checkpoint around each layer."""

    checkpointed = True


def sharded(model: Model, reshard: bool) -> Model:
    """By layer, and the root."""
    for layer in model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    return fully_shard(model, reshard_after_forward=reshard)


Way = Callable[[int, int, bool], nn.Module]
WAYS: dict[str, Way] = {
    "FSDP2, plain": lambda *size: sharded(Model(*size[:2]), size[2]),
    "FSDP2, checkpoint a layer": lambda *size: sharded(Checkpointed(*size[:2]), size[2]),
    "mfx, gamma 0.9": lambda *size: mfx.momentumize(sharded(Model(*size[:2]), size[2]), 0.9),
    "mfx, gamma 0": lambda *size: mfx.momentumize(sharded(Model(*size[:2]), size[2]), 0.0),
}


CASES = [(way, reshard) for reshard in (True, False) for way in WAYS]


def work(rank: int, folder: str, depth: int, width: int) -> None:
    """Measure all ways in one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {(way, reshard): measured(WAYS[way](depth, width, reshard), rank) for way, reshard in CASES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measured(model: nn.Module, rank: int) -> dict[str, Any]:
    """Bytes and collectives of a step."""
    x = torch.randn(BATCH, TOKENS, 32, generator=torch.Generator().manual_seed(rank))

    def forward() -> tuple[Any, Tensor]:
        out = model(x)
        return out, out.square().mean()

    for _ in range(2):
        forward()[1].backward()
    found: dict[str, Any] = {"bytes": [step_bytes(forward) for _ in range(STEPS)]}
    with CommDebugMode() as counting:
        _, loss = forward()
        found["forward"] = _count(counting, "allgather")
        loss.backward()
        found["backward"] = _count(counting, "allgather") - found["forward"]
        found["reduced"] = _count(counting, "reduce_scatter")
    return found


def _count(counting: CommDebugMode, name: str) -> int:
    return sum(count for kind, count in counting.get_comm_counts().items() if name in str(kind))


def row(way: str, reshard: bool, found: list[dict[str, Any]]) -> dict[str, object]:
    """What both processes found, as a row of the table."""
    steps = list(zip(*(one["bytes"] for one in found), strict=True))
    return {
        "way": way,
        "reshard_after_forward": reshard,
        "peak of a step, MiB": _spread([max(one.peak for one in pair) for pair in steps]),
        "alive after forward, MiB": _spread([max(one.after_forward for one in pair) for pair in steps]),
        "all-gathers, forward": found[0]["forward"],
        "all-gathers, backward": found[0]["backward"],
        "reduce-scatters": found[0]["reduced"],
    }


def _spread(sizes: list[int]) -> str:
    least, middle, most = (size / 2**20 for size in (min(sizes), median(sizes), max(sizes)))
    return f"{middle:.1f} ({least:.1f} to {most:.1f})"


def main() -> None:
    """Measure all ways and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (folder, args.depth, args.width), nprocs=2)  # type: ignore[attr-defined]
        both = [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]
    rows = [row(*case, [found[case] for found in both]) for case in CASES]
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, two processes of one thread, gloo"
    RESULTS.write_text(
        "# Sharded by layer (FSDP2)\n\n"
        f"Written by `python benchmarks/sharded.py`. {args.depth} layers of width {args.width} (attention and MLP, "
        f"float32), {BATCH} sequences of {TOKENS} tokens in each process. Measured on: {machine}, torch "
        f"{torch.__version__}.\n\n"
        "Bytes are the allocator's, of the process that has more, above what is there before the step; whole "
        "parameters and gradients count while they are alive. "
        f"The median of {STEPS} steps, and the least and the most.\n\n"
        f"{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
