"""The Markdown table of what ``survey.py`` printed."""

from __future__ import annotations

from statistics import median
from typing import Any

TOLERANCE = {"float64": 1e-8, "float32": 1e-3}
"""Relative error allowed; a bias before a BatchNorm has no gradient but noise, so it is of the whole."""
_NO_BLOCK = {"PROJECTION", "SUBTRACTED_SKIP", "NO_PARAMETERS", "BROADCAST"}
"""What an add is that has no skip which x passes as it is, or no branch that learns."""


def verdict(row: dict[str, Any]) -> str:
    """``right``, ``no residual block``, or what is wrong."""
    if "gradients" not in row:
        return "failed"
    if not row["rewritten"]:
        return "kept" if set(row["kept"]) - _NO_BLOCK else "no residual block"
    allowed = TOLERANCE[row.get("dtype", "float64")]
    right = row["gamma_0"] < allowed and row["gradients"] < allowed
    return "right" if right else "WRONG"


def cost(rows: list[dict[str, Any]]) -> str:
    """What the proofs cost, in a sentence; captures by Dynamo need none."""
    proven = [row for row in rows if row.get("proofs")]
    if not proven:
        return "No capture needed a proof."
    first, without = ([row["first_call"] - row["proof"] * left for row in proven] for left in (0, 1))
    most = max(proven, key=lambda row: row["proof"])
    return (
        f"Until the first call had returned, models with proven captures ({len(proven)}) took {sum(first):.1f} s, "
        f"{sum(without):.1f} s of them without the proof (medians {median(first):.2f} s and {median(without):.2f} s); "
        f"the longest, {most['family']}'s, took {most['proof']:.1f} s of {most['first_call']:.1f} s. "
        f"Captures that a proof refused: {sum(len(row.get('refused', ())) for row in rows)}."
    )


def _saved(rows: list[dict[str, Any]]) -> str:
    shares = [row["share"] for row in rows if "share" in row]
    return f" They keep {median(shares):.3f} (median) of the bytes that plain backprop keeps." if shares else ""


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, after a summary."""
    verdicts = [verdict(row) for row in rows]
    residual = [row for row, said in zip(rows, verdicts, strict=True) if said != "no residual block"]
    right = verdicts.count("right")
    lines = [
        f"{len(rows)} models, {len(residual)} of them residual; {right} ({right / max(len(residual), 1):.0%}) "
        f"rewritten, equal to the original at gamma = 0, and with the gradients of the stored run.{_saved(rows)}",
        "",
        cost(rows),
        "",
        "| family | model | capture | blocks | chains | bytes kept, of plain | gamma = 0 | reversible - stored "
        "| first call, s | without proof | verdict |",
        "| --- " * 11 + "|",
    ]
    for row, said in zip(rows, verdicts, strict=True):
        why = row.get("reason") or (", ".join(row["kept"]) if said == "kept" else "")
        numbers = [f"{row[key]:.0e}" if key in row else "" for key in ("gamma_0", "gradients")]
        known = "first_call" in row
        seconds = [f"{row['first_call'] - row['proof'] * left:.1f}" if known else "" for left in (0, 1)]
        cells = [row.get(key, "") for key in ("family", "model", "capture", "rewritten", "chains")]
        cells.append(f"{row['share']:.3f}" if "share" in row else "")
        said = f"{said}: {why}".replace("|", "/") if why else said
        lines.append("| " + " | ".join(map(str, [*cells, *numbers, *seconds, said])) + " |")
    return "\n".join(lines)
