"""Stored: the warning for what keeps its activations where a compiler traces it."""

from __future__ import annotations

import warnings

from mfx.errors import CompiledStoredWarning, Reason
from mfx.pipeline import Passed


def warn_of_stored(passed: Passed) -> None:
    """Say which chains, and what beside them, of a compiled graph are stored, though nobody asked for it, and why."""
    plan, flow = passed.plan, passed.found.flow
    for chain in plan.chains:
        asked = not chain.eager.reversible or chain.compiled.reason is Reason.STORED_ON_REQUEST
        if not chain.compiled.reversible and not asked and not chain.plain:
            _warn(
                f"the chain of blocks {chain.names[0]!r} to {chain.names[-1]!r}",
                chain.compiled.text,
                "Exclude that block, or",
            )
    if plan.options.activation_budget is None:
        return
    inside = {node for chain in plan.momentum for block in chain.blocks for node in block.members}
    node = next((node for node in flow.nodes if node not in inside and not flow.is_repeatable(node)), None)
    if node is not None:
        _warn("what lies between two segments", Reason.UNREPEATABLE.text(node), "With activation_budget= set,")


def _warn(what: str, why: str, remedy: str) -> None:
    warnings.warn(
        f"{what} keeps its activations: {why}. {remedy} draw with torch's own functions (dropout, rand, "
        "bernoulli_ ...)",
        CompiledStoredWarning,
        stacklevel=4,
    )
