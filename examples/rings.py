"""Nested rings in the plane: a ResNet cannot pull them apart without tearing the plane, a Momentum ResNet can.

A disc and two rings around it, the middle ring in one class and the other two in the other. The layers are small
steps of one smooth field, h * f(x, t) with h = 1 / depth, and act on the plane itself: no further dimension to
leave into. With so small steps a ResNet follows x' = f(x, t), a continuous deformation of the plane, under which a
ring stays closed around what is inside it. So no line separates the classes; all the ResNet can do is to squeeze the
inside through as thin a gap as it can make. A Momentum ResNet follows epsilon * x'' + x' = f(x, t): points with
different velocities pass through each other, and nothing keeps the inside in.

Both are trained with a linear classifier behind them. The table gives the accuracy on fresh points, and how far a
ResNet layer is from the identity: the largest norm of the Jacobian of h * f along the way. While it is below one,
every layer is a one-to-one map near the points, and the argument above applies.

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
from torch.nn.functional import cross_entropy

import mfx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "rings.png"
COLOURS = ("#2a6f97", "#dd8f2d")


class Layer(nn.Module):
    """One step of time h: x -> h * f(x, t). The field f is shared by all layers, so its change in time is smooth."""

    def __init__(self, field: nn.Module, t: float, h: float) -> None:
        super().__init__()
        self.field, self.t, self.h = field, t, h

    def forward(self, x: Tensor) -> Tensor:
        return self.h * self.field(torch.cat([x, torch.full_like(x[:, :1], self.t)], dim=1))


def rings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of a disc and two rings of outer radius 0.47, 1.13 and 1.8, and their classes 0, 1, 0."""
    random = torch.Generator().manual_seed(seed)
    ring = torch.arange(count) % 3
    angle, share = 2 * torch.pi * torch.rand(count, generator=random), torch.rand(count, generator=random)
    radius = torch.where(ring == 0, 0.47 * share.sqrt(), (2 * ring + 0.6 + 0.8 * share) / 3)
    return radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1), ring % 2


def network(depth: int, epsilon: float, seed: int) -> tuple[mfx.MomentumNet, nn.Linear]:
    """A ResNet for epsilon = 0, a Momentum ResNet otherwise, and the classifier; both from the same weights."""
    torch.manual_seed(seed)
    field = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))
    gamma = 1 - 1 / (epsilon * depth) if epsilon else 0.0
    layers = [Layer(field, k / depth, 1 / depth) for k in range(depth)]
    return mfx.MomentumNet(layers, gamma, use_backprop=gamma == 0), nn.Linear(2, 2)


def train(net: mfx.MomentumNet, head: nn.Linear, steps: int, seed: int) -> float:
    """Train both on 400 points, and return the accuracy on 2000 others."""
    x, label = rings(400, seed)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = cross_entropy(head(net(x)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, label = rings(2000, seed + 1000)
    with torch.no_grad():
        return (head(net(x)).argmax(dim=1) == label).float().mean().item()


def states(net: mfx.MomentumNet, x: Tensor) -> list[Tensor]:
    """x after 0, 1, ... depth layers."""
    with torch.no_grad():
        return [x, *(mfx.MomentumNet(net.functions[:k], net.gamma)(x) for k in range(1, len(net) + 1))]


def steepest(net: mfx.MomentumNet, x: Tensor) -> float:
    """The largest spectral norm of a layer's Jacobian at the points that the layer sees."""
    norms = []
    for layer, state in zip(net.functions, states(net, x), strict=False):
        jacobian = torch.vmap(torch.func.jacrev(lambda point, layer=layer: layer(point.unsqueeze(0))[0]))(state)
        norms.append(torch.linalg.matrix_norm(jacobian, 2).max().item())
    return max(norms)


def draw(nets: dict[str, tuple[mfx.MomentumNet, nn.Linear]], path: Path) -> None:
    """Points, the edge of the disc and the middle of the rings after some layers; the classifier's line."""
    x, label = rings(600, seed=5000)
    angle = torch.linspace(0, 2 * torch.pi, 1000).unsqueeze(1)
    circles = [radius * torch.cat([angle.cos(), angle.sin()], dim=1) for radius in (0.47, 1.0, 1.67)]
    figure, axes = plt.subplots(2, 5, figsize=(9.6, 4.3), layout="constrained")
    for row, (name, (net, head)) in zip(axes, nets.items(), strict=True):
        points, *curves = (states(net, start) for start in (x, *circles))
        for column, axis in enumerate(row):
            layer = column * len(net) // 4
            axis.scatter(*points[layer].T, c=[COLOURS[int(value)] for value in label], s=3, lw=0, alpha=0.5)
            for curve, colour in zip(curves, (COLOURS[0], COLOURS[1], COLOURS[0]), strict=True):
                axis.plot(*curve[layer].T, color=colour, lw=1.1)
            axis.set(xticks=[], yticks=[], box_aspect=1)
            axis.set_title(f"{name}, layer {layer}" if column == 0 else f"layer {layer}", fontsize=9, loc="left")
        with torch.no_grad():
            (a, b), c = (head.weight[1] - head.weight[0]).tolist(), (head.bias[1] - head.bias[0]).item()
        near = (-a * c / (a * a + b * b), -b * c / (a * a + b * b))  # the point of the line nearest to the origin
        limits = row[-1].axis()
        row[-1].axline(near, (near[0] - b, near[1] + a), color="0.2", lw=1.2, ls="--")
        row[-1].axis(limits)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    Image.open(path).quantize(64).save(path, optimize=True)  # a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(description="Separating nested rings in the plane.")
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--epsilon", type=float, default=1.0, help="gamma = 1 - 1 / (epsilon * depth)")
    parser.add_argument("--quick", action="store_true", help="a tiny setting, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    depth, steps, seeds = (8, 10, 1) if options.quick else (options.depth, 500, 3)

    table = Table("seed", "ResNet", "its steepest layer", "Momentum ResNet", title="accuracy on fresh points")
    runs = []
    for seed in range(seeds):
        nets = {"ResNet": network(depth, 0.0, seed), "Momentum ResNet": network(depth, options.epsilon, seed)}
        plain, momentum = (train(net, head, steps, seed) for net, head in nets.values())
        norm = steepest(nets["ResNet"][0], rings(500, seed)[0])
        table.add_row(str(seed), f"{plain:.1%}", f"{norm:.2f}", f"{momentum:.1%}")
        runs.append((plain, momentum, nets))
    mean, mean_momentum = (sum(values) / seeds for values in list(zip(*runs, strict=True))[:2])
    table.add_row("mean", f"{mean:.1%}", "", f"{mean_momentum:.1%}")
    Console().print(table)
    draw(max(runs, key=lambda run: run[0])[2], options.out)  # the seed that went best for the ResNet


if __name__ == "__main__":
    main()
