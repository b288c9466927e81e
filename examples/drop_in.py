"""Drop-in replacement: a ResNet, a Transformer and a vision transformer become reversible in one line each.

Nothing in the models is edited, and all parameters keep their names.  For a torchvision ResNet-101, a
torch.nn.Transformer and a torchvision ViT this shows what one training forward keeps for backward, plain and as a
momentum network.  What stands outside of the chains (a ResNet's stem, the blocks that change the shape) stays as it is,
and keeps what it kept.  At gamma = 0 the new model gives the outputs of the old one.

Reference: Sander, Ablin, Blondel, Peyre, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mfx

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "drop_in.png"
Made = tuple[nn.Module, tuple[Tensor, ...], Callable[[nn.Module, float], nn.Module]]


def resnet(quick: bool) -> Made:
    """Momentum between the blocks that momentumize finds."""
    model = torchvision.models.resnet18() if quick else torchvision.models.resnet101()
    images = torch.randn(2, 3, *(2 * [32 if quick else 128]))
    return model, (images,), lambda model, gamma: mfx.momentumize(model, gamma)


def transformer(quick: bool) -> Made:
    """Whole layers as blocks, as with momentumnet's function of this name."""
    depth, width = (2, 32) if quick else (12, 128)
    model = nn.Transformer(width, 4, depth, depth, 4 * width, batch_first=True)
    source, target = torch.randn(4, 20 if quick else 64, width), torch.randn(4, 10 if quick else 48, width)
    layers = ["encoder.layers", "decoder.layers"]
    return (
        model,
        (source, target),
        lambda model, gamma: mfx.transform_to_momentumnet(model, layers, gamma, keep_first_layer=False),
    )


def vision_transformer(quick: bool) -> Made:
    """Two blocks a layer: attention and feed-forward."""
    depth, width = (2, 32) if quick else (12, 192)
    model = torchvision.models.VisionTransformer(64, 8, depth, 4, width, 4 * width, num_classes=10)
    for parameter in model.heads.parameters():
        nn.init.normal_(parameter)  # zero at first, and so would be all outputs
    return model, (torch.randn(4, 3, 64, 64),), lambda model, gamma: mfx.momentumize(model, gamma)


MODELS = {"ResNet-101": resnet, "nn.Transformer": transformer, "ViT": vision_transformer}


def kept(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """MiB that one training forward keeps for backward, parameters and inputs aside."""
    return mfx.kept_bytes(model, list(inputs), lambda: model(*inputs))[0] / 2**20


def same_at_zero(model: nn.Module, inputs: tuple[Tensor, ...], convert: Any) -> float:
    """The relative difference of outputs at gamma = 0, in evaluation mode."""
    with torch.no_grad():
        expected = model.eval()(*inputs)
        difference = convert(model, 0.0).eval()(*inputs) - expected
    model.train()
    return float(difference.norm() / expected.norm())


def measure(make: Callable[[bool], Made], quick: bool) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    model, inputs, convert = make(quick)
    difference = same_at_zero(model, inputs, convert)
    new = convert(model, 0.9)
    assert list(new.state_dict()) == list(model.state_dict())
    plain, momentum = kept(model, inputs), kept(new, inputs)
    chains = [len(chain.blocks) for chain in mfx.chains(new)]
    return {"chains": chains, "plain": plain, "momentum": momentum, "difference": difference}


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars, plain beside momentum."""
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    places = range(len(rows))
    for shift, key, color in ((-0.2, "plain", "#888888"), (0.2, "momentum", "#c0392b")):
        values = [row[key] for row in rows.values()]
        bars = axes.bar([place + shift for place in places], values, 0.4, label=key, color=color)
        axes.bar_label(bars, fmt="%.0f MiB" if max(values) > 10 else "%.1f MiB", padding=2)
    axes.set_xticks(list(places), list(rows))
    axes.set_ylabel("kept for backward (MiB)")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a model keeps for backward, plain and as a momentum network.")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    rows = {name: measure(make, options.quick) for name, make in MODELS.items()}
    table = Table("model", "blocks in chains of", "plain", "momentum", "share", "difference at gamma = 0")
    for name, row in rows.items():
        chains = ", ".join(map(str, row["chains"]))
        sizes = [f"{row[key]:.1f} MiB" for key in ("plain", "momentum")]
        table.add_row(name, chains, *sizes, f"{row['momentum'] / row['plain']:.0%}", f"{row['difference']:.0e}")
    Console(width=110).print(table)
    draw(rows, options.out)


if __name__ == "__main__":
    main()
