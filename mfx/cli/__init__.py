"""The command line: ``mfx report``, ``mfx fit`` and ``mfx verify`` for a model that can be named."""

from mfx.cli.commands import main

__all__ = ["main"]
