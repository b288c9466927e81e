"""Docstrings for the site: they are written for Python's ``help``, and are put into what mkdocstrings reads.

1. Roles become links where they name something public (``:class:`mfx.Rule```), else code; ``::`` becomes a colon.
2. ``a, b: text`` under Args and Raises becomes an entry for each name.
3. ``Example:`` becomes ``Examples:``, the heading whose doctests are shown as code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc):`~?([\w.]+)`")
_PUBLIC = re.compile(r"mfx\.[A-Za-z_]+")
_SHARED = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:,\s+\w+)+)(?P<text>: .*(?:\n(?P=indent) .*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """What griffe loads, with its docstrings put into the style that it reads."""

    def on_object(self, *, obj: griffe.Object, **given: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = restyled(obj.docstring.value)


def restyled(text: str) -> str:
    text = _ROLE.sub(lambda role: _code(role[1]), text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return _SHARED.sub(_each, text)


def _code(name: str) -> str:
    return f"[`{name}`][{name}]" if _PUBLIC.fullmatch(name) else f"`{name}`"


def _each(entry: re.Match[str]) -> str:
    return "\n".join(f"{entry['indent']}{name}{entry['text']}" for name in re.split(r",\s+", entry["names"]))
