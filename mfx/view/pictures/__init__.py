"""A report as pictures and as a page; matplotlib is imported when something is drawn."""

from mfx.view.pictures.blocks import drawn_blocks
from mfx.view.pictures.files import fragment, page, saved
from mfx.view.pictures.step import drawn_step

__all__ = ["drawn_blocks", "drawn_step", "fragment", "page", "saved"]
