"""From a graph and a plan to a new graph, in which each chain is one node."""

from mfx.rewrite.binding import Binding, ByRoot, Lifted, Velocity
from mfx.rewrite.compiled import AS_THEY_ARE, Branches
from mfx.rewrite.rewriter import Rewritten, chains_with_rules, rewrite, with_rules

__all__ = [
    "AS_THEY_ARE",
    "Binding",
    "Branches",
    "ByRoot",
    "Lifted",
    "Rewritten",
    "Velocity",
    "chains_with_rules",
    "rewrite",
    "with_rules",
]
