"""From a graph to the residual blocks in it, and to the adds that are none, each with its reason.  Pure."""

from mfx.find.block import Block, Rejection
from mfx.find.far import Far
from mfx.find.finder import Found, find

__all__ = ["Block", "Far", "Found", "Rejection", "find"]
