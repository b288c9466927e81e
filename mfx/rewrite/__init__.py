"""From a graph and a plan to a new graph, in which each chain is one node."""

from mfx.rewrite.binding import Binding, ByRoot, Lifted, Velocity
from mfx.rewrite.rewriter import Rewritten, rewrite, with_rules

__all__ = ["Binding", "ByRoot", "Lifted", "Rewritten", "Velocity", "rewrite", "with_rules"]
