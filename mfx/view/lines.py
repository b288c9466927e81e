"""Lines: what the text of a report says below its table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mfx.memory import format_bytes
from mfx.plan import Forecast


def forecast_lines(found: Forecast) -> Iterator[str]:
    """The peak of a step within a budget."""
    peak, plain, least = map(format_bytes, (found.peak, found.plain, found.least))
    yield f"activations of a training step at most: {peak}, of plain backprop {plain}; the least possible is {least}"
    yield f"most is alive at: {found.where}"


def chain_lines(chain: Any) -> Iterator[str]:
    """What a chain costs and what would do better."""
    if len(chain.gammas) == 1 and chain.gammas[0] != 0:
        factor = f"{chain.pull:.3g}"
        yield f"chain {chain.index} has one block, so it is x + {factor} f(x) and has no momentum"
    if chain.stored:
        yield f"{_head(chain)}; as momentum, activations are stored as well ({chain.stored})"
        return
    if chain.state_bytes is not None and chain.snapshots is not None:
        count = len(chain.snapshots)
        snapshots = f", {count} snapshots, {chain.interval} steps apart at most" if count else ""
        drift = f"drift up to {chain.drift:.0e}" if chain.drift else "no drift"
        line = (
            f"{_head(chain)}, as momentum {format_bytes(chain.state_bytes)} "
            f"(state in {chain.state_dtype}{snapshots}, {drift})"
        )
        late = f"; it does not pay before {chain.break_even} such blocks: exclude them to save time"
        yield line if chain.pays else line + late
        yield from _advice_lines(chain)


def _advice_lines(chain: Any) -> Iterator[str]:
    """Where something else would do better than to reverse a chain."""
    if chain.advice == "keep" and chain.free:
        yield (
            f"chain {chain.index}: nothing at all does better: kept, the activations leave the peak where it is and "
            f"save {chain.work or 0:.1e} FLOPs of recomputation (activation_budget= keeps what fits)"
        )
    if chain.advice == "checkpoint":
        yield (
            f"chain {chain.index}: a checkpoint around each block does better: it keeps "
            f"{format_bytes(chain.checkpoint_bytes or 0)} and inverts nothing (gamma=0 for these blocks)"
        )


def _head(chain: Any) -> str:
    size = "" if chain.activation_bytes is None else f" {format_bytes(chain.activation_bytes)}"
    return f"chain {chain.index}: {len(chain.blocks)} blocks keep{size or ' their activations'}"
