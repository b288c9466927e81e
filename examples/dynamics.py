"""Trajectories in one dimension: those of a ResNet never cross, those of a Momentum ResNet may.

With functions h * f(x, t), where h = 1 / depth and t = layer / depth, many layers are small steps in time. A ResNet
then follows the first-order equation x' = f(x, t). Through a point (x, t) goes one solution, so on a line no
trajectory overtakes another: a ResNet keeps the order of its inputs. A Momentum ResNet with
gamma = 1 - 1 / (epsilon * depth) follows the second-order equation

    epsilon * x'' + x' = f(x, t),    x'(0) = 0,

whose solutions differ in velocity where they meet, so they may cross. With epsilon = 1 / depth, which is gamma = 0,
it is the ResNet. Here both learn the map x -> -x, which turns the order of all inputs around. Of the maps that keep
the order, the best is constant, x -> 0, and its loss is the mean of x^2: the table sets it beside what training
reached, and counts the pairs of trajectories that cross.

Reference: Sander, Ablin, Blondel and Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mfx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "dynamics.png"


class Layer(nn.Module):
    """One step of time h: x -> h * f(x, t). The field f is shared by all layers, so its change in time is smooth."""

    def __init__(self, field: nn.Module, t: float, h: float) -> None:
        super().__init__()
        self.field, self.t, self.h = field, t, h

    def forward(self, x: Tensor) -> Tensor:
        return self.h * self.field(torch.cat([x, torch.full_like(x, self.t)], dim=1))


def network(depth: int, epsilon: float) -> mfx.MomentumNet:
    """A ResNet for epsilon = 0, a Momentum ResNet otherwise; both start from the same weights."""
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    gamma = 1 - 1 / (epsilon * depth) if epsilon else 0.0
    return mfx.MomentumNet([Layer(field, k / depth, 1 / depth) for k in range(depth)], gamma, use_backprop=gamma == 0)


def train(net: mfx.MomentumNet, x: Tensor, steps: int) -> float:
    """Fit x -> -x and return the loss that is reached."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.03, total_steps=steps)
    for _ in range(steps):
        loss = (net(x) + x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (net(x) + x).square().mean().item()


@torch.no_grad()
def trajectories(net: mfx.MomentumNet, x: Tensor) -> Tensor:
    """x after 0, 1, ... depth layers, of shape (depth + 1, points)."""
    states = [mfx.MomentumNet(net.functions[:k], net.gamma)(x) for k in range(1, len(net) + 1)]
    return torch.stack([x, *states]).squeeze(-1)


def crossings(paths: Tensor) -> tuple[int, int]:
    """How many pairs of trajectories change their order somewhere, and how many pairs there are."""
    first, second = torch.triu_indices(paths.shape[1], paths.shape[1], offset=1)
    gap = paths[:, second] - paths[:, first]  # positive at the start, for inputs in increasing order
    return int((gap < 0).any(dim=0).sum()), len(first)


def draw(found: dict[str, Tensor], path: Path) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(9.6, 3.6), sharey=True, layout="constrained")
    for axis, (title, paths) in zip(axes, found.items(), strict=True):
        depth = len(paths) - 1
        colours = plt.get_cmap("coolwarm")((paths[0].numpy() + 1) / 2)
        for line, colour in zip(paths.T.numpy(), colours, strict=True):
            axis.plot(line, color=colour, lw=1.3)
        axis.scatter([depth * 1.03] * len(colours), -paths[0], c=colours, s=9, clip_on=False)
        axis.set(title=title, xlabel="layer", xlim=(0, depth * 1.03))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("x (dots: where it should end)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    Image.open(path).quantize(64).save(path, optimize=True)  # a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(description="Trajectories of ResNets and Momentum ResNets on a line.")
    parser.add_argument("--depth", type=int, default=40)
    parser.add_argument("--steps", type=int, default=350, help="training steps")
    parser.add_argument("--quick", action="store_true", help="a tiny setting, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    depth, steps = (12, 40) if options.quick else (options.depth, options.steps)

    x = torch.linspace(-1, 1, 31).unsqueeze(1)
    table = Table("network", "gamma", "loss", "of x -> 0", "pairs that cross")
    found = {}
    for epsilon in (0.0, 0.4, 1.0):
        net = network(depth, epsilon)
        loss = train(net, x, steps)
        name = f"momentum, epsilon = {epsilon:g}" if epsilon else "ResNet"
        found[name] = trajectories(net, x)
        crossed, pairs = crossings(found[name])
        table.add_row(name, f"{net.gamma:.3f}", f"{loss:.5f}", f"{x.square().mean():.5f}", f"{crossed} of {pairs}")
    Console().print(table)
    draw(found, options.out)


if __name__ == "__main__":
    main()
