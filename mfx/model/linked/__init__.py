"""Models whose Python between the blocks cannot be captured: each block is a part, linked with others while it runs."""

from mfx.model.linked.links import Links

__all__ = ["Links"]
