"""Sharded models: process groups of one and of two, what is to be sharded, and gradients put together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from helpers import Result, run
from nets import Net
from peaks import allocated_peak
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import mfx

Model = TypeVar("Model", bound=nn.Module)
Work = Callable[..., Any]


@contextlib.contextmanager
def process_group(folder: Path, rank: int = 0, size: int = 1) -> Iterator[None]:
    """With gloo, for this process and ``size - 1`` others."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_two_processes(work: Work, folder: Path, cases: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """What ``work(rank, *case)``, a function of a support module, gives in each of two processes, for each case."""
    multiprocessing.spawn(_worker, (work, folder, cases), nprocs=2)  # type: ignore[attr-defined]
    return list(zip(*(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)), strict=True))


def _worker(rank: int, work: Work, folder: Path, cases: Sequence[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    with process_group(folder, rank, 2):
        torch.save([work(rank, *case) for case in cases], folder / f"{rank}.pt")


def by_block(model: Model, **options: Any) -> Model:
    """Each block and the root sharded."""
    for block in model.blocks:  # type: ignore[union-attr,attr-defined]
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def momentum(
    model: Model, order: str, gamma: float = 0.8, shard: Callable[[Model], Model] = by_block, **given: Any
) -> Model:
    """Momentumized and sharded, in the one order or the other."""
    if order == "before":
        return mfx.momentumize(shard(model), gamma, **given)
    return shard(mfx.momentumize(model, gamma, **given))


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def run_sharded(model: nn.Module, *inputs: Any, **given: Any) -> Result:
    """:func:`helpers.run`, with gradients put together."""
    result = run(model, *inputs, **given)
    result.grads.update({name: None if grad is None else whole(grad) for name, grad in result.grads.items()})
    return result


class Checkpointed(Net):
    """A Net with a checkpoint around each block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def batch(rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and targets: those of a process, or of both."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (4, 2))
    return (x, y) if rank is None else (x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4])


def fresh(kind: type[Net] = Net, **given: Any) -> Net:
    """The same in every process."""
    torch.manual_seed(0)
    return kind(**{"p": 0.0, **given})


def losses(model: nn.Module, rank: int | None = None, steps: int = 20) -> list[float]:
    """The losses of some steps of training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x, y = batch(rank)
    found = []
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def sharded_losses(rank: int, order: str, gamma: float) -> list[float]:
    """Those of one of two processes."""
    return losses(momentum(fresh(depth=5), order, gamma), rank)


def collectives(rank: int, way: str, reshard: bool) -> list[tuple[int, int, int]]:
    """How often two steps of training gather in forward, gather in backward, and reduce."""
    shard = partial(by_block, reshard_after_forward=reshard)
    if way == "checkpoint":
        model = shard(fresh(Checkpointed, depth=5))
    else:
        order, gamma = way.split()
        model = momentum(fresh(depth=5), order, float(gamma), shard)
    found = []
    for _ in range(2):
        with CommDebugMode() as counting:
            loss = model(batch(rank)[0]).square().sum()
            forward = _count(counting, "allgather")
            loss.backward()
            every = _count(counting, "allgather")
        found.append((forward, every - forward, _count(counting, "reduce_scatter")))
    return found


def _count(counting: CommDebugMode, name: str) -> int:
    return sum(count for kind, count in counting.get_comm_counts().items() if name in str(kind))


def most_alive(rank: int, way: str) -> int:
    """The peak of a step, by the allocator, of blocks with large weights."""
    if way == "checkpoint":
        model = by_block(fresh(Checkpointed, depth=8, width=96))
    elif way == "root":
        model = mfx.momentumize(fresh(depth=8, width=96), 0.9)
        fully_shard(model)
    else:
        model = momentum(fresh(depth=8, width=96), way, 0.9)

    def step() -> None:
        model(batch(rank)[0]).square().sum().backward()

    step()
    step()
    # Threads of gloo let go of what was gathered when they come to it: the least is what the step needs.
    return min(allocated_peak(step) for _ in range(5))


def compiled_gradients(rank: int, ways: str) -> dict[str, Tensor]:
    """Gradients of a second step, where a model was made in these ways, in their order."""
    make: dict[str, Work] = {
        "momentumize": lambda model: mfx.momentumize(model, 0.9),
        "shard": by_block,
        "shard the root": fully_shard,
        "compile blocks": _compile_blocks,
        "compile": lambda model: torch.compile(model, backend="aot_eager"),
    }
    model = net = fresh()
    for way in ways.split(", "):
        net = make[way](net)
        model = model if way == "compile" else net
    for _ in range(2):
        model.zero_grad()
        (net(batch(rank)[0]) - batch(rank)[1]).square().mean().backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}  # type: ignore[arg-type]


def _compile_blocks(model: Net) -> Net:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


def parallel(rank: int, order: str, sequence: bool, modules: Any) -> dict[str, Tensor]:
    """Gradients of a momentumized body with tensor parallelism, and sequence parallelism, of its blocks' inside."""
    mesh = dist.init_device_mesh("cpu", (2,))
    split = Shard(1)
    inside = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    if sequence:
        inside = {
            "norm": SequenceParallel(),
            "mlp": PrepareModuleInput(input_layouts=(split,), desired_input_layouts=(Replicate(),)),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=split),
        }

    def shard(body: nn.Sequential) -> nn.Sequential:
        for block in body:
            parallelize_module(block, mesh, inside)
        return body

    mm = momentum(body_of_layers(), order, 0.9, shard, modules=modules)
    x = tokens()[:, 3 * rank : 3 * rank + 3] if sequence else tokens()
    leaf = x.clone().requires_grad_()
    mm(leaf).square().sum().backward()
    grads = {name: whole(parameter.grad) for name, parameter in mm.named_parameters()}
    return {**grads, "x": leaf.grad}  # type: ignore[dict-item]


def tokens() -> Tensor:
    """Some sequences."""
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def body_of_layers() -> nn.Sequential:
    """Three layers that can be made parallel."""
    torch.manual_seed(0)
    return nn.Sequential(*(_Layer() for _ in range(3))).double()


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), _Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))
