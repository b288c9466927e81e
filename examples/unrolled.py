"""A learned solver for sparse coding, made reversible: LISTA, its momentum version, and a RevNet.

Sparse coding finds, for a signal y and a dictionary D, the x with the least lasso objective
|y - D x|^2 / 2 + lambda |x|_1. One step of the classic solver, ISTA, is a layer of a network:

    x <- soft_threshold(W_x x + W_y y, theta),    W_x = I - D^T D / L,    W_y = D^T / L,    theta = lambda / L.

LISTA starts from these weights and trains all of them on the objective itself, which few layers then bring down
further than the same number of ISTA steps. Soft thresholding cannot be undone, so LISTA has to store every layer.
`mfx.MomentumNet(layers, gamma, is_residual=False, use_backprop=False)` runs the same layers as a reversible network
(v <- gamma v + (1 - gamma) (layer(x, y) - x), x <- x + v), from the same weights; y is an extra argument. The other
network is a RevNet: x in two halves, a <- a + f(b, y), b <- b + g(a, y), where f and g are layers of the same kind.
It is invertible too, but a step of ISTA is none of its steps.

Every network sees fresh signals in each training step. The picture shows how far above the lasso optimum (found by
FISTA) each of them ends on test signals: mean and range over the seeds, each with its own dictionary.

Reference: Sander, Ablin, Blondel and Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mfx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIGNAL, CODE, LAMBDA = 20, 40, 0.1
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "unrolled.png"
COLOURS = {"ISTA": "#8d8d8d", "RevNet": "#dd8f2d", "LISTA": "#c44e52", "momentum": "#2a6f97"}


def soft_threshold(z: Tensor, theta: Tensor | float) -> Tensor:
    return z.sign() * (z.abs() - theta).relu()


class Layer(nn.Module):
    """x -> soft_threshold(W_x x + W_y y, theta)."""

    def __init__(self, w_x: Tensor, w_y: Tensor, theta: float) -> None:
        super().__init__()
        self.w_x, self.w_y = nn.Parameter(w_x.clone()), nn.Parameter(w_y.clone())
        self.theta = nn.Parameter(torch.full((len(w_x),), theta))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return soft_threshold(x @ self.w_x.T + y @ self.w_y.T, self.theta)


class Unrolled(nn.Sequential):
    """The layers one after the other: ISTA, and after training LISTA."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, y)
        return x


class RevNet(nn.Sequential):
    """Additive coupling: two layers a step, each of which reads one half of x and adds to the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        for layer in self:
            a, b = b, a + layer(b, y)
        return torch.cat([a, b], dim=1)


class Lasso:
    """A random dictionary with columns of norm one, and signals that sparse codes and some noise make."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        dictionary = torch.randn(SIGNAL, CODE, generator=self.random)
        self.dictionary = dictionary / dictionary.norm(dim=0)
        step = 1 / torch.linalg.matrix_norm(self.dictionary, 2).item() ** 2
        self.w_x = torch.eye(CODE) - step * self.dictionary.T @ self.dictionary
        self.w_y, self.theta = step * self.dictionary.T, step * LAMBDA

    def signals(self, count: int) -> Tensor:
        chosen = torch.rand(count, CODE, generator=self.random) < 0.1
        codes = chosen * torch.randn(count, CODE, generator=self.random)
        return codes @ self.dictionary.T + 0.01 * torch.randn(count, SIGNAL, generator=self.random)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return ((y - x @ self.dictionary.T).square().sum(dim=1) / 2 + LAMBDA * x.abs().sum(dim=1)).mean()

    def optimum(self, y: Tensor) -> float:
        """The least objective, by 2000 iterations of FISTA."""
        x = z = torch.zeros(len(y), CODE)
        t = 1.0
        for _ in range(2000):
            after, t_after = soft_threshold(z @ self.w_x.T + y @ self.w_y.T, self.theta), (1 + (1 + 4 * t * t) ** 0.5) / 2
            x, z, t = after, after + (t - 1) / t_after * (after - x), t_after
        return self.objective(x, y).item()

    def networks(self, depth: int, gamma: float) -> dict[str, nn.Module]:
        """The networks of `depth` layers before training; all layers start from the weights of ISTA."""
        layers = [[Layer(self.w_x, self.w_y, self.theta) for _ in range(depth)] for _ in range(3)]
        halves = [slice(0, CODE // 2), slice(CODE // 2, CODE)] * depth  # 1 / depth: a sum of depth steps, not the last
        coupled = [(self.w_x[to, :][:, of] / depth, self.w_y[to] / depth) for to, of in zip(halves, halves[1:] + halves[:1])]
        return {
            "ISTA": Unrolled(*layers[0]),
            "RevNet": RevNet(*(Layer(w_x, w_y, self.theta / depth) for w_x, w_y in coupled)),
            "LISTA": Unrolled(*layers[1]),
            "momentum": mfx.MomentumNet(layers[2], gamma, is_residual=False, use_backprop=False),
        }


def train(net: nn.Module, lasso: Lasso, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y = lasso.signals(256)
        loss = lasso.objective(net(torch.zeros(len(y), CODE), y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def excess(depths: list[int], seed: int, steps: int, gamma: float) -> dict[tuple[str, int], float]:
    """Test objective above the optimum, of every network."""
    lasso = Lasso(seed)
    y = lasso.signals(1000)
    optimum = lasso.optimum(y)
    found = {}
    for depth in depths:
        for name, net in lasso.networks(depth, gamma).items():
            if name != "ISTA":
                train(net, lasso, steps)
            with torch.no_grad():
                found[name, depth] = lasso.objective(net(torch.zeros(len(y), CODE), y), y).item() - optimum
    return found


def draw(depths: list[int], found: dict[tuple[str, int], list[float]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9.6, 4.4), layout="constrained")
    for name, colour in COLOURS.items():
        values = [found[name, depth] for depth in depths]
        axis.fill_between(depths, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)
        axis.plot(depths, [statistics.mean(v) for v in values], "o-", color=colour, lw=2, ms=5, label=name)
    axis.set(yscale="log", xticks=depths, xlabel="depth (layers)", ylabel="lasso objective above the optimum")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9")
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="A learned sparse coder, made reversible.")
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--quick", action="store_true", help="a tiny setting, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    depths, seeds, steps = ([2, 4], 2, 20) if options.quick else ([2, 4, 8, 12, 16, 20], 3, options.steps)

    runs = [excess(depths, seed, steps, options.gamma) for seed in range(seeds)]
    found = {key: [run[key] for run in runs] for key in runs[0]}
    table = Table("depth", *COLOURS, title=f"lasso objective above the optimum: mean (range) of {seeds} seeds")
    for depth in depths:
        cells = [found[name, depth] for name in COLOURS]
        table.add_row(str(depth), *(f"{statistics.mean(c):.4f} ({min(c):.4f} to {max(c):.4f})" for c in cells))
    Console().print(table)
    draw(depths, found, options.out)


if __name__ == "__main__":
    main()
