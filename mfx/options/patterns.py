"""Patterns: fnmatch patterns over the names of blocks and modules."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from mfx.errors import InputTypeError, OptionError

Patterns = str | Iterable[str] | None


def as_patterns(argument: str, patterns: Patterns) -> tuple[str, ...]:
    if patterns is None:
        return ()
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = (patterns,)
    listed = tuple(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise InputTypeError(f"{argument} takes fnmatch patterns (str), not {type(pattern).__name__} ({pattern!r})")
    return listed


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str], what: str = "block") -> None:
    """Refuse patterns that match none of ``names``, listing near ones."""
    names = list(names)
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:5]
        listed = f"; near names: {', '.join(map(repr, near))}" if near else f"; there is no {what} at all"
        raise OptionError(f"{argument}={pattern!r} matches no {what}{listed}")
