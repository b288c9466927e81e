"""A learned solver for sparse coding, made reversible: LISTA, its momentum version, and a RevNet.

Sparse coding finds, for a signal y and a dictionary D, the x with the least lasso objective
|y - D x|^2 / 2 + lambda |x|_1. One step of the classic solver, ISTA, is a layer of a network:

    x <- soft_threshold(W_x x + W_y y, theta),    W_x = I - D^T D / L,    W_y = D^T / L,    theta = lambda / L.

LISTA starts from these weights and trains all of them on the objective itself. Soft thresholding cannot be undone,
so LISTA stores every layer. As `mfx.MomentumNet(layers, gamma, is_residual=False, use_backprop=False)` the same
layers, from the same weights, are a reversible network: v <- gamma v + (1 - gamma) (layer(x, y) - x), x <- x + v, with
y as an extra argument. At gamma = 0 it is LISTA. A RevNet is invertible by other means, x in two halves,
a <- a + f(b, y), b <- b + g(a, y) with such layers as f and g; but a step of ISTA is none of its steps.

Every training step draws fresh signals. The picture shows how far above the optimum (found by FISTA) the objective
is on test signals: mean and range over seeds, each with its own dictionary.

Reference: Sander, Ablin, Blondel and Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

import argparse
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
LABELS = {"ISTA": "ISTA, not trained", "RevNet": "RevNet", "LISTA": "LISTA, not invertible", "momentum": "momentum"}
COLOURS = {"ISTA": "#8d8d8d", "RevNet": "#dd8f2d", "LISTA": "#c44e52", "momentum": "#2a6f97"}


class Layer(nn.Module):
    """x -> soft_threshold(W_x x + W_y y, theta)."""

    def __init__(self, w_x: Tensor, w_y: Tensor, theta: float) -> None:
        super().__init__()
        self.w_x, self.w_y = nn.Parameter(w_x.clone()), nn.Parameter(w_y.clone())
        self.theta = nn.Parameter(torch.full((len(w_x),), theta))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x @ self.w_x.T + y @ self.w_y.T
        return z.sign() * (z.abs() - self.theta).relu()


class RevNet(nn.Module):
    """Additive coupling: each layer reads one half of x and adds to the other; two layers make a step."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        for layer in self.layers:
            a, b = b, a + layer(b, y)
        return torch.cat([a, b], dim=1)


class Lasso:
    """A random dictionary with columns of norm one; its signals have sparse codes, and some noise."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        dictionary = torch.randn(SIGNAL, CODE, generator=self.random)
        self.dictionary = dictionary / dictionary.norm(dim=0)
        self.step = 1 / torch.linalg.matrix_norm(self.dictionary, 2).item() ** 2

    def signals(self, count: int) -> Tensor:
        chosen = torch.rand(count, CODE, generator=self.random) < 0.1
        codes = chosen * torch.randn(count, CODE, generator=self.random)
        return codes @ self.dictionary.T + 0.01 * torch.randn(count, SIGNAL, generator=self.random)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return ((y - x @ self.dictionary.T).square().sum(dim=1) / 2 + LAMBDA * x.abs().sum(dim=1)).mean()

    def layer(self, to: slice = slice(None), of: slice = slice(None), scale: float = 1.0) -> Layer:
        """A step of ISTA as a layer, or the part of it that takes the coordinates `of` to the coordinates `to`."""
        w_x = torch.eye(CODE) - self.step * self.dictionary.T @ self.dictionary
        w_y = self.step * self.dictionary.T
        return Layer(scale * w_x[to, of], scale * w_y[to], scale * self.step * LAMBDA)

    @torch.no_grad()
    def optimum(self, y: Tensor) -> float:
        """The least objective, by 1000 iterations of FISTA."""
        ista, t = self.layer(), 1.0
        x = z = torch.zeros(len(y), CODE)
        for _ in range(1000):
            before, x, last, t = x, ista(z, y), t, (1 + (1 + 4 * t * t) ** 0.5) / 2
            z = x + (last - 1) / t * (x - before)
        return self.objective(x, y).item()

    def networks(self, depth: int, gamma: float) -> dict[str, nn.Module]:
        """The networks before training. RevNet adds up all its layers, so each starts 1 / depth as large."""
        a, b = slice(0, CODE // 2), slice(CODE // 2, CODE)
        coupling = [self.layer(*pair, scale=1 / depth) for _ in range(depth) for pair in ((a, b), (b, a))]
        ista, lista, momentum = ([self.layer() for _ in range(depth)] for _ in range(3))
        return {
            "ISTA": mfx.MomentumNet(ista, gamma=0, is_residual=False),
            "RevNet": RevNet(coupling),
            "LISTA": mfx.MomentumNet(lista, gamma=0, is_residual=False),
            "momentum": mfx.MomentumNet(momentum, gamma, is_residual=False, use_backprop=False),
        }


def train(net: nn.Module, lasso: Lasso, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        y = lasso.signals(128)
        loss = lasso.objective(net(torch.zeros(len(y), CODE), y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def excess(depths: list[int], seed: int, steps: int, gamma: float) -> dict[str, list[float]]:
    """The objective above the optimum on test signals, of every network at each depth."""
    lasso = Lasso(seed)
    y = lasso.signals(500)
    optimum = lasso.optimum(y)
    found: dict[str, list[float]] = {name: [] for name in COLOURS}
    for depth in depths:
        for name, net in lasso.networks(depth, gamma).items():
            if name != "ISTA":
                train(net, lasso, steps)
            with torch.no_grad():
                found[name].append(lasso.objective(net(torch.zeros(len(y), CODE), y), y).item() - optimum)
    return found


def draw(depths: list[int], found: dict[str, Tensor], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9.6, 4.4), layout="constrained")
    for name, values in found.items():
        axis.fill_between(depths, values.amin(1), values.amax(1), color=COLOURS[name], alpha=0.25, lw=0)
        axis.plot(depths, values.mean(1), "o-", color=COLOURS[name], lw=2, ms=5)
        axis.text(depths[-1] + 0.3, values[-1].mean().item(), LABELS[name], va="center", color=COLOURS[name])
    axis.set(yscale="log", xticks=depths, xlabel="depth (layers)", ylabel="lasso objective above the optimum")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="A learned sparse coder, made reversible.")
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--quick", action="store_true", help="a tiny setting, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    depths, seeds, steps = ([2, 4], 2, 10) if options.quick else ([2, 4, 8, 16], 3, 200)

    runs = [excess(depths, seed, steps, options.gamma) for seed in range(seeds)]
    found = {name: torch.tensor([run[name] for run in runs]).T for name in COLOURS}
    table = Table("depth", *COLOURS, title=f"lasso objective above the optimum\nmean and range of {seeds} seeds")
    for index, depth in enumerate(depths):
        cells = [values[index] for values in found.values()]
        table.add_row(str(depth), *(f"{cell.mean():.4f}\n{cell.amin():.4f}-{cell.amax():.4f}" for cell in cells))
    Console().print(table)
    draw(depths, found, options.out)


if __name__ == "__main__":
    main()
