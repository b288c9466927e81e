"""Memory against depth: plain backpropagation, checkpointing and the reversible Momentum ResNet.

One small function is applied `depth` times to the same points, with gamma = 1 - 1 / (50 * depth): the setting of
the memory figure of Sander, Ablin, Blondel and Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv
2102.07870. All three ways compute the same recurrence, so they differ only in what they keep:

- stored: `mfx.MomentumNet(..., use_backprop=True)`, every activation;
- checkpointed: `torch.utils.checkpoint` around every block, which keeps each block's state (x, v);
- reversible: `mfx.MomentumNet(..., use_backprop=False)`, which keeps the last state and steps back from it.

Two numbers are measured. The bytes kept for backward are those of the tensors that autograd holds when the
forward has ended (`mfx.kept_bytes`). The peak of a whole training step is the largest sum of bytes in all
tensor storages that are alive after any operation of forward and backward: a dispatch mode sees every operation,
weak references tell when a storage is gone. It equals what the profiler counts, and the growth of the resident set
under an allocator that returns every block (glibc with MALLOC_MMAP_THRESHOLD_=65536). Parameters and the input are
counted in neither.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mfx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 2**20
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "memory.png"
COLOURS = {"stored": "#c44e52", "checkpointed": "#dd8f2d", "reversible": "#2a6f97"}


class PeakBytes(TorchDispatchMode):
    """The largest sum of bytes of the storages that were made in its context and alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            StorageWeakRef(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)
        }
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and StorageWeakRef(leaf.untyped_storage()) not in given:
                self._alive[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


class Checkpointed(nn.Module):
    """The momentum recurrence with a checkpoint around every block."""

    def __init__(self, function: nn.Module, depth: int, gamma: float) -> None:
        super().__init__()
        self.function, self.depth, self.gamma = function, depth, gamma

    def block(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = self.gamma * v + (1 - self.gamma) * self.function(x)
        return x + v, v

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for _ in range(self.depth):
            x, v = checkpoint(self.block, x, v, use_reentrant=False)
        return x


def networks(function: nn.Module, depth: int) -> dict[str, nn.Module]:
    """The same network three times, on the same parameters."""
    gamma = 1 - 1 / (50 * depth)
    return {
        "stored": mfx.MomentumNet([function] * depth, gamma, use_backprop=True),
        "checkpointed": Checkpointed(function, depth, gamma),
        "reversible": mfx.MomentumNet([function] * depth, gamma, use_backprop=False),
    }


def loss_of(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: net(x).square().mean()


def gradients(net: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the loss with respect to all parameters, as one vector."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss_of(net, x)(), list(net.parameters()))])


def measure(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """MiB kept for backward, and MiB at the peak of forward and backward."""
    kept, loss = mfx.kept_bytes(net, [x], loss_of(net, x))
    del loss
    with PeakBytes() as memory:
        gradients(net, x)
    return kept / MIB, memory.peak / MIB


def draw(depths: list[int], found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.7), sharey=True, layout="constrained")
    for index, (axis, title) in enumerate(zip(axes, ("kept for backward", "peak of a training step"), strict=True)):
        for name, values in found.items():
            heights = [value[index] for value in values]
            axis.plot(depths, heights, "o-", color=COLOURS[name], lw=2, ms=4.5, label=name)
        axis.set(title=title, xlabel="depth (number of blocks)", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("memory (MiB)")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a Momentum ResNet against its depth.")
    parser.add_argument("--points", type=int, default=20_000, help="the input has shape (2, points, 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny setting, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    depths = [1, 11, 21] if options.quick else [1, 101, 201, 301, 401]

    torch.manual_seed(0)
    function = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 2))
    x = torch.rand(2, 1000 if options.quick else options.points, 2)
    ways = ("stored", "checkpointed", "reversible")
    table = Table("depth", *(f"{way}\nkept / peak" for way in ways), "gradient error\nreversible", title="MiB")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for depth in depths:
        nets = networks(function, depth)
        for way, net in nets.items():
            found[way].append(measure(net, x))
        exact, ours = gradients(nets["stored"], x), gradients(nets["reversible"], x)
        error = float((ours - exact).norm() / exact.norm())
        cells = [f"{kept:.2f} / {peak:.2f}" for kept, peak in (found[way][-1] for way in ways)]
        table.add_row(str(depth), *cells, f"{error:.1e}")
    Console().print(table)
    draw(depths, found, options.out)


if __name__ == "__main__":
    main()
