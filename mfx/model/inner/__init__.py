"""Modules inside of a captured part: they raise where they would be the plain network (M13)."""

from mfx.model.inner.guard import Guard
from mfx.model.inner.shells import guard_below, guarded_shell, guards_of, note_guards, replaced

__all__ = ["Guard", "guard_below", "guarded_shell", "guards_of", "note_guards", "replaced"]
