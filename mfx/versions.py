"""Differences between the torch versions that mfx runs on (2.11 to 2.15), each told by what torch offers."""

from __future__ import annotations

from typing import Any


def source_name(source: Any) -> str:
    """Dynamo's name of a graph input: ``Source.name`` is a method in torch 2.11 and a property in 2.15."""
    name: Any = source.name
    return str(name() if callable(name) else name)
