"""Lines: what the text of a report says below its table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def lag_lines(chains: Iterable[Any], readout: str) -> Iterator[str]:
    """By how many blocks the state that branches read lags behind where it would come to rest."""
    lags = {chain.lag for chain in chains if len(chain.blocks) > 1 and chain.lag is not None and chain.lag > 0}
    if lags:
        how = "which readout='z' would hand out" if readout == "x" else "which is handed out"
        blocks = ", ".join(f"{lag:.3g}" for lag in sorted(lags))
        yield f"branches read an x that lags by {blocks} blocks behind where it would come to rest (z), {how}"


def sharded_lines(sharded: tuple[tuple[str, int], ...]) -> Iterator[str]:
    """Which modules are one step instead of several, since they are sharded."""
    for count in sorted({count for _, count in sharded if count > 1}):
        names = [name for name, number in sharded if number == count]
        shown = ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
        yield (
            f"sharded, and so taken whole: {shown}. The {count} residual blocks in each are one step, "
            "another function than unsharded where gamma is not 0 (granularity='layer' or modules= give the same)"
        )
