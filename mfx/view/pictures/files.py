"""Files: a report as a page, and as a file by the ending of its name."""

from __future__ import annotations

import io
import json
from html import escape
from pathlib import Path
from typing import Any

from mfx.errors import OptionError
from mfx.view.pictures.blocks import drawn_blocks
from mfx.view.pictures.canvas import colour_of
from mfx.view.pictures.step import drawn_step

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 14px sans-serif; color: #22313f; max-width: 70em; margin: 2em auto; padding: 0 1em }}
svg {{ max-width: 100%; height: auto }}</style></head>
<body>
{body}
</body></html>
"""


def fragment(cells: list[dict[str, object]], chains: list[int | None], lines: list[str]) -> str:
    """A table of ``cells``, each row in the colour of its chain, and the ``lines`` below it."""
    names = list(dict.fromkeys(name for row in cells for name in row))
    head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in names)
    rows = []
    for row, chain in zip(cells, chains, strict=True):
        edge = f"border-left:4px solid {colour_of(chain)}"
        inner = "".join(f"<td style='text-align:left'>{escape(str(row.get(name, '')))}</td>" for name in names)
        rows.append(f"<tr style='{edge}'>{inner}</tr>")
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    table = f"<table style='border-collapse:collapse'>{inside}</table>" if cells else ""
    text = escape("\n".join(lines))
    return f"{table}<pre style='white-space:pre-wrap'>{text}</pre>"


def page(report: Any) -> str:
    """A page with the table and the pictures, in one file."""
    pictures = [drawn_blocks(report)] if report.blocks else []
    pictures += [drawn_step(report)] if report.courses else []
    body = "\n".join([f"<h1>{escape(report.model)}</h1>", *map(_svg, pictures), report._repr_html_()])
    return _PAGE.format(title=f"mfx: {escape(report.model)}", body=body)


def saved(report: Any, path: str | Path) -> None:
    """Write a report as .html, .json, or as a picture of its blocks, .svg or .png.

    Raises:
        OptionError: the name ends in something else.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".html":
        path.write_text(page(report), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    elif kind in (".svg", ".png"):
        drawn_blocks(report).savefig(path, dpi=120)
    else:
        raise OptionError(f"{str(path)!r}: a report is saved as .html, .svg, .png or .json")


def _svg(picture: Any) -> str:
    text = io.StringIO()
    picture.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
