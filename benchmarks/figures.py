"""From the JSON of :mod:`step` to the tables of results/step.md and README.md, and to the picture of the frontier.

Ratios are to plain backprop of the same case; a dash stands for what was not measured, and a word for why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ways import BUDGETS, FRONTIER, WAYS, name_of
from zoo import CASES

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "frontier.png"
MARKS = ("<!-- step: begin (benchmarks/step.py writes this) -->", "<!-- step: end -->")
"""Between these lines of README.md stands what the script writes."""

_SHORT = ("checkpoint", "momentumnet", "mfx, gamma 0", "mfx, gamma 0, budget 0", "mfx, gamma 0.9")
_SHORT_2 = ("mfx, gamma 0.9, budget 0", "mfx, gamma 0.9, budget 0.5")


def write_all(data: dict[str, Any]) -> None:
    """Write the tables and the picture."""
    (ROOT / "benchmarks" / "results" / "step.md").write_text(page(data))
    picture(data)
    _into_readme(data)


def cell(data: dict[str, Any], kind: str, case: str, way: str) -> dict[str, Any]:
    """One result; empty where there is none."""
    return data[kind].get(f"{case} | {way}", {})


def page(data: dict[str, Any]) -> str:
    """All tables as Markdown."""
    machines = sorted({found["machine"] for kind in ("peaks", "times") for found in data[kind].values()})
    parts = [
        "# A training step: memory and time beside what a user would pick",
        f"Written by `python benchmarks/step.py`, from `step.json` beside it. Measured on: {'; '.join(machines)}.",
        "Shares are of plain backprop of the same model. Bytes are the allocator's, above what is there before the "
        "step: parameters, inputs and gradients from the step before are not among them; the model's output is. Each "
        "peak is measured in a process of its own, times interleaved in one.",
        "## Peak of a step in which gradients exist",
        *_plain_first(data, "peak"),
        "## Alive after the forward",
        *_plain_first(data, "after_forward"),
        "## Peak of a step that creates the gradients, less these",
        *_plain_first(data, "first_step"),
        "## Step time over plain",
        times_table(data),
        "## Measured over predicted",
        "The peak by the allocator over the peak that the plan foresaw.",
        predicted_table(data),
        "## What could not be had",
        not_had(data),
    ]
    return "\n\n".join(parts) + "\n"


def _plain_first(data: dict[str, Any], key: str) -> list[str]:
    rows = []
    for case in _measured(data, "peaks"):
        plain = cell(data, "peaks", case, "plain").get(key)
        if plain:
            shares = [_share(cell(data, "peaks", case, way), key, plain) for way in _ways(data, "peaks")]
            rows.append([case, f"{plain / 2**20:.1f}", *shares])
    return [markdown(["", "plain, MiB", *_ways(data, "peaks")], rows)]


def _share(found: dict[str, Any], key: str, plain: float) -> str:
    return f"{found[key] / plain:.2f}" if key in found else _word(found)


def _word(found: dict[str, Any]) -> str:
    return "fails" if "error" in found else "n/a" if "not_here" in found else "-"


def times_table(data: dict[str, Any]) -> str:
    """Step times over plain's, with quartiles."""
    ways = [way for way in _ways(data, "times") if way != "plain"]
    rows = []
    for case in _measured(data, "times"):
        plain = cell(data, "times", case, "plain").get("seconds", 0.0)
        rows.append([case, f"{plain:.2f}", *(_time(cell(data, "times", case, way)) for way in ways)])
    return markdown(["", "plain, s", *ways], rows)


def _time(found: dict[str, Any]) -> str:
    if "ratio" not in found:
        return _word(found)
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def predicted_table(data: dict[str, Any]) -> str:
    """Measured over predicted peaks, by budget; where they differ by more than a tenth, in bold."""
    ways = [name_of(gamma, budget) for gamma in (0.9, 0.0) for budget in BUDGETS if budget is not None]
    rows = []
    for case in _measured(data, "peaks"):
        found = [cell(data, "peaks", case, way) for way in ways]
        if any("predicted" in one for one in found):
            rows.append([case, *(_off(one) for one in found)])
    return markdown(["", *(way.removeprefix("mfx, ") for way in ways)], rows)


def _off(found: dict[str, Any]) -> str:
    if "predicted" not in found:
        return _word(found)
    ratio = found["peak"] / found["predicted"]
    return f"{ratio:.2f}" if 0.9 <= ratio <= 1.1 else f"**{ratio:.2f}**"


def not_had(data: dict[str, Any]) -> str:
    """Why cells are missing."""
    whys: dict[str, list[str]] = {}
    for kind in ("peaks", "times"):
        for found in data[kind].values():
            why = found.get("error") or found.get("not_here")
            if why:
                whys.setdefault(f"{found['way']}: {why}", []).append(found["case"])
    lines = [f"- {why} ({', '.join(dict.fromkeys(cases))})" for why, cases in whys.items()]
    return "\n".join(lines) or "Nothing."


def _measured(data: dict[str, Any], kind: str) -> list[str]:
    known = {found["case"] for found in data[kind].values()}
    return [case.name for case in CASES if case.name in known]


def _ways(data: dict[str, Any], kind: str) -> list[str]:
    known = {found["way"] for found in data[kind].values() if "not_here" not in found}
    return [way.name for way in WAYS if way.name in known]


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headers) + " |", "| " + " | ".join("---" for _ in headers) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def short(data: dict[str, Any]) -> str:
    """README's table: peak, and time where it is known, of a few ways."""
    ways = [way for way in (*_SHORT, *_SHORT_2) if way in _ways(data, "peaks")]
    rows = []
    for case in _measured(data, "peaks"):
        plain = cell(data, "peaks", case, "plain").get("peak")
        if plain:
            rows.append([case, f"{plain / 2**20:.0f} MiB", *(_both(data, case, way, plain) for way in ways)])
    machines = sorted({found["machine"] for kind in ("peaks", "times") for found in data[kind].values()})
    heading = (
        "Peak of a training step, and its time where that was measured, over plain backprop's "
        f"({'; '.join(machines)}; `python benchmarks/step.py`; [all tables](benchmarks/results/step.md)):"
    )
    return f"{heading}\n\n{markdown(['', 'plain peak', *ways], rows)}"


def _both(data: dict[str, Any], case: str, way: str, plain: float) -> str:
    memory = _share(cell(data, "peaks", case, way), "peak", plain)
    ratio = cell(data, "times", case, way).get("ratio")
    return memory if ratio is None else f"{memory}, time {ratio:.2f}"


def _into_readme(data: dict[str, Any]) -> None:
    readme = ROOT / "README.md"
    begin, end = MARKS
    text = readme.read_text()
    if begin not in text:
        raise LookupError(f"README.md has no line {begin!r}")
    inside = f"{begin}\n\n{short(data)}\n\n{end}"
    readme.write_text(re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: inside, text, flags=re.DOTALL))


def picture(data: dict[str, Any]) -> None:
    """Time against peak memory, a panel each for the cases that are measured at every budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [case for case in FRONTIER if case in _measured(data, "times") and case in _measured(data, "peaks")]
    if not cases:
        return
    figure, axes = pyplot.subplots(1, len(cases), figsize=(3.6 * len(cases), 3.6), squeeze=False, layout="constrained")
    for ax, case in zip(axes[0], cases, strict=True):
        for label, ways, style in _series():
            points = sorted(_points(data, case, ways))
            if points:
                ax.plot(*zip(*points, strict=True), style, label=label, markersize=6)
        ax.set_title(case)
        ax.set_xlabel("peak of a step, of plain")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("time of a step, of plain")
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=2 if len(cases) == 1 else len(handles)
    )
    figure.savefig(PICTURE, dpi=120)
    pyplot.close(figure)


def _series() -> list[tuple[str, list[str], str]]:
    budgets = [budget for budget in BUDGETS if budget is not None]
    ours = [
        (f"mfx, gamma {gamma:g}, by budget", [name_of(gamma, b) for b in budgets], style) for gamma, style in _STYLES
    ]
    others = [("plain", ["plain"], "ks"), ("checkpoint a block", ["checkpoint"], "r^")]
    return [*others, ("momentumnet", ["momentumnet"], "mD"), *ours]


_STYLES = ((0.9, "o-"), (0.0, "x--"))


def _points(data: dict[str, Any], case: str, ways: Sequence[str]) -> list[tuple[float, float]]:
    plain = cell(data, "peaks", case, "plain").get("peak", 0)
    found = [(cell(data, "peaks", case, way), cell(data, "times", case, way)) for way in ways]
    return [
        (peak["peak"] / plain, time["ratio"]) for peak, time in found if plain and "peak" in peak and "ratio" in time
    ]
