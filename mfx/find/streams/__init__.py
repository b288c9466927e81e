"""Streams that read each other, as one state."""

from mfx.find.streams.joining import with_streams
from mfx.find.streams.rounds import Rounds, rounds_of

__all__ = ["Rounds", "rounds_of", "with_streams"]
