"""Stored: the warning for chains that keep their activations where a compiler traces them."""

from __future__ import annotations

import warnings

from mfx.errors import CompiledStoredWarning, Reason
from mfx.plan import Plan


def warn_of_stored(plan: Plan) -> None:
    """Say which chains of a compiled graph are stored, though nobody asked for it, and why."""
    for chain in plan.chains:
        if chain.compiled.reversible or chain.compiled.reason is Reason.STORED_ON_REQUEST:
            continue
        warnings.warn(
            f"the chain of blocks {chain.names[0]!r} to {chain.names[-1]!r} keeps its activations: "
            f"{chain.compiled.text}. Exclude that block, or draw with torch's own functions (dropout, rand, "
            "bernoulli_ ...)",
            CompiledStoredWarning,
            stacklevel=3,
        )
