"""Train a small ResNet and its momentum version on handwritten digits, and compare the two.

Both start from the same weights and see the same batches. The plain network keeps the activations
of every block for backward, the momentum network one state for each chain of blocks: raise
`--depth`, and the memory of the one grows while that of the other hardly does.
"""

import argparse
import copy
import time

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mfx


class Block(nn.Module):
    """A residual block: two convolutions, each after a batch norm, with dropout between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ResNet(nn.Module):
    """Three stages of `depth` blocks each, on images of 8, 4 and 2 pixels a side."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.stage1 = nn.Sequential(*(Block(16) for _ in range(depth)))
        self.down1 = nn.Conv2d(16, 32, kernel_size=2, stride=2)
        self.stage2 = nn.Sequential(*(Block(32) for _ in range(depth)))
        self.down2 = nn.Conv2d(32, 64, kernel_size=2, stride=2)
        self.stage3 = nn.Sequential(*(Block(64) for _ in range(depth)))
        self.norm = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage1(self.stem(images))
        x = self.stage2(self.down1(x))
        x = self.stage3(self.down2(x))
        return self.head(self.norm(x).relu().mean(dim=(2, 3)))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Scikit-learn's handwritten digits, three quarters to train on and one to test on."""
    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8).astype("float32") / 16
    parts = train_test_split(images, labels, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)


def train(model: nn.Module, data: TensorDataset, epochs: int, seed: int, progress: Progress, name: str) -> float:
    """Train `model` in place and return the seconds it took."""
    torch.manual_seed(seed)  # the same dropout masks ...
    order = torch.Generator().manual_seed(seed)  # ... and the same batches for every model
    batches = DataLoader(data, batch_size=64, shuffle=True, drop_last=True, generator=order)
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    task = progress.add_task(name, total=steps)
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"{name}  loss {loss.item():.3f}")
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """The share of `data` that `model` gets right."""
    images, labels = data.tensors
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def saved_bytes(model: nn.Module, data: TensorDataset) -> int:
    """Bytes that a training forward keeps for backward, parameters and buffers aside."""
    images, labels = data[:64]
    model.train()
    size, _ = mfx.kept_bytes(model, [images, labels], lambda: cross_entropy(model(images), labels))
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description="A ResNet and its momentum version on digits.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--depth", type=int, default=6, help="blocks in each of the three stages")
    parser.add_argument("--gamma", type=float, default=0.9, help="momentum; 0 is the plain network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    options = parser.parse_args()
    epochs = 1 if options.quick else options.epochs

    torch.manual_seed(options.seed)
    plain = ResNet(options.depth)
    # momentumize shares the parameters with the model it is given; the copy has its own.
    momentum = mfx.momentumize(copy.deepcopy(plain), gamma=options.gamma)

    console = Console()
    console.print(str(mfx.report(plain, gamma=options.gamma)), highlight=False, markup=False)
    train_data, test_data = digits()
    table = Table("network", "test accuracy", "kept for backward", "seconds")
    with Progress(console=console) as progress:
        for name, model in (("ResNet", plain), ("Momentum ResNet", momentum)):
            seconds = train(model, train_data, epochs, options.seed, progress, name)
            table.add_row(
                name,
                f"{accuracy(model, test_data):.1%}",
                f"{saved_bytes(model, train_data) / 2**20:.2f} MiB",
                f"{seconds:.1f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
