"""Gradient error and memory by gamma and depth, beside momentumnet.

Each cell trains nothing: one backward of a stack of residual blocks in float32, default options, and

1. *error*: relative L2 error over the gradients of all parameters, reversible against stored activations, each
   library against its own stored run of the same weights and input;
2. *memory*: bytes kept for backward by mfx's reversible run as a fraction of the stored one's; *alive*: the same by
   the allocator, after forward;
3. *state*: the tensors of x's size that the chain keeps, and their dtype ("x" where every x is kept).

    python benchmarks/precision.py [--width 16] [--batch 64] [--depths 8 32 100 300 1000] [--out FILE]

momentumnet comes with ``pip install 'mfx[bench]'``; without it its columns stay empty.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import mfx
from mfx import kept_bytes
from mfx.memory import step_bytes
from mfx.model.conversion import momentum_of

GAMMAS = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01, 0.0)
LIMIT = 1e-3


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        """The block's value."""
        return x + self.f(x)


def branches(kind: str, depth: int, width: int) -> list[nn.Module]:
    """Branches with normalization, or without."""
    torch.manual_seed(0)
    if kind == "normalized":
        return [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        ]
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(depth)]


def gradient(network: nn.Module, x: Tensor) -> Tensor:
    """The gradient of a loss with respect to all parameters, as one vector."""
    found = torch.autograd.grad(network(x).square().mean(), list(network.parameters()))
    return torch.cat([grad.flatten() for grad in found]).double()


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm."""
    return ((found - expected).norm() / expected.norm()).item()


def of_mfx(functions: list[nn.Module], gamma: float, x: Tensor) -> dict[str, Any]:
    """Error, memory and state of mfx."""
    model = nn.Sequential(*(Residual(f) for f in functions))
    reversible = mfx.momentumize(model, gamma=gamma)
    stored = mfx.momentumize(model, gamma=gamma, reversible=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrong = error(gradient(reversible, x), gradient(stored, x))
    share = kept_bytes(reversible, [x], lambda: reversible(x))[0] / kept_bytes(stored, [x], lambda: stored(x))[0]
    held = [step_bytes(lambda mm=mm: mm(x), lambda y: None) for mm in (reversible, stored)]
    alive = "" if None in held else f"{held[0].after_forward / held[1].after_forward:.1%}"
    (spec,) = momentum_of(reversible).latest()
    plan = spec.schedule(x.dtype)
    count = plan.state_count(len(functions))
    dtype = str(plan.state_dtype).removeprefix("torch.")
    state = f"{count} x, {dtype}" if len(plan.snapshots) == len(functions) else f"{count}, {dtype}"
    warned = any(issubclass(one.category, mfx.DriftWarning) for one in caught)
    text = f"{wrong:.0e}" + (" (warned)" if warned else "")
    return {"mfx error": text, "memory": f"{share:.1%}", "alive": alive, "state": state}


def of_momentumnet(functions: list[nn.Module], gamma: float, x: Tensor) -> dict[str, str]:
    """Error and memory of momentumnet."""
    try:
        import momentumnet
    except ImportError:
        return {"momentumnet error": "", "its memory": ""}
    runs, kept = [], []
    for stored in (False, True):
        own = [copy.deepcopy(f) for f in functions]
        network = momentumnet.MomentumNet(own, gamma=gamma, use_backprop=stored)
        try:
            size, output = kept_bytes(network, [x], lambda network=network: network(x))
            found = torch.autograd.grad(output.square().mean(), list(network.parameters()))
        except Exception as reason:
            return {"momentumnet error": f"raises {type(reason).__name__}", "its memory": ""}
        runs.append(torch.cat([grad.flatten() for grad in found]).double())
        kept.append(size)
    wrong = error(*runs)
    text = f"{wrong:.0e}" if wrong <= LIMIT else f"**{wrong:.0e}**"
    return {"momentumnet error": text, "its memory": ""}


def rows(kind: str, depths: list[int], width: int, batch: int) -> Iterator[dict[str, Any]]:
    """A row for each gamma and depth."""
    for gamma in GAMMAS:
        for depth in depths:
            functions = branches(kind, depth, width)
            x = torch.randn(batch, width)
            ours, theirs = of_mfx(functions, gamma, x), of_momentumnet(functions, gamma, x)
            theirs.pop("its memory")
            yield {"gamma": gamma, "depth": depth, **ours, **theirs}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 100, 300, 1000])
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    parts = []
    for kind in ("normalized", "plain"):
        table = tabulate(
            list(rows(kind, given.depths, given.width, given.batch)),
            headers="keys",
            tablefmt="github",
            disable_numparse=True,
        )
        parts.append(f"## {TITLES[kind]}\n\n{table}\n")
        print(parts[-1])
    seconds = time.perf_counter() - start
    machine = f"{os.cpu_count()}-core {platform.machine()} CPU, one thread, torch {torch.__version__.partition('+')[0]}"
    setting = f"width {given.width}, batch {given.batch}, float32, default options; {machine}; {seconds:.0f} s"
    print(setting)
    if given.out:
        with open(given.out, "w") as file:
            file.write(f"{INTRODUCTION.format(setting=setting)}\n" + "\n".join(parts))


TITLES = {
    "normalized": "Branches with normalization: LayerNorm, Linear, GELU, Linear",
    "plain": "Branches without: Linear, Tanh, Linear",
}
INTRODUCTION = """# Gradient error and memory by gamma and depth

Relative L2 error over the gradients of all parameters, reversible against stored activations of the same recurrence
(each library against its own); bytes that mfx keeps for backward as a fraction of the stored run's, counted by hooks
(memory) and by the allocator after forward (alive); the tensors of x's size that the chain keeps. Errors above 1e-3
are bold: momentumnet 0.10 gives them without a warning.

Setting: {setting}. Made by `python benchmarks/precision.py`.
"""

if __name__ == "__main__":
    main()
