"""Step: the bytes that are alive along one training step, plain backprop beside momentum, as fake tensors tell.

Forward takes the left half of the picture and backward the right one, each operation as much room as another; gradients
of parameters are counted apart, as in the report's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mfx.errors import OptionError
from mfx.memory import format_bytes
from mfx.view.pictures.canvas import COLOURS, INK, KEPT, bare, figure


def drawn_step(report: Any) -> Any:
    """A matplotlib figure of one training step.

    Raises:
        OptionError: the report has no example inputs, or torch could not tell its bytes.
    """
    if not report.courses:
        why = f" ({report.step.unknown})" if report.step is not None and report.step.unknown else ""
        raise OptionError(f"a picture of a step needs example_inputs that a step can be foreseen for{why}")
    canvas = figure(8, 3.6)
    axes = canvas.subplots()
    for (name, course), colour in zip(report.courses.items(), (KEPT, COLOURS[0]), strict=False):
        xs, ys = _along(course), [size / 2**20 for size in course.bytes]
        axes.fill_between(xs, ys, color=colour, alpha=0.35, step="post", linewidth=0)
        most = max(range(len(ys)), key=ys.__getitem__)
        axes.plot(xs, ys, color=colour, drawstyle="steps-post", label=f"{name}: {format_bytes(course.bytes[most])}")
        axes.plot(xs[most], ys[most], "o", color=colour, markersize=4)
    axes.axvline(1, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlim=(0, 2), xticks=(0.5, 1.5), xticklabels=("forward", "backward"), ylabel="activations alive (MiB)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"One training step of {report.model}", fontsize=11, color=INK)
    axes.legend(frameon=False, title="at most", loc="upper left")
    axes.tick_params(axis="x", length=0)
    bare(axes, "top", "right")
    return canvas


def _along(course: Any) -> Sequence[float]:
    """Where each operation stands: forward from 0 to 1, backward from 1 to 2."""
    ahead, back = max(course.forward, 1), max(len(course.bytes) - course.forward, 1)
    return [k / ahead if k < course.forward else 1 + (k - course.forward) / back for k in range(len(course.bytes))]
