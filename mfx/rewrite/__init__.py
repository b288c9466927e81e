"""From a graph and a plan to a new graph, in which each chain is one node."""

from mfx.rewrite.binding import Added, Binding, ByRoot, Lifted
from mfx.rewrite.compiled import AS_THEY_ARE, Branches
from mfx.rewrite.rewriter import Rewritten, chains_with_rules, rewrite, with_rules

__all__ = [
    "AS_THEY_ARE",
    "Added",
    "Binding",
    "Branches",
    "ByRoot",
    "Lifted",
    "Rewritten",
    "chains_with_rules",
    "rewrite",
    "with_rules",
]
