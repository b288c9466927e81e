"""Rows: the value that a report is, and how it looks as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import networkx as nx
from tabulate import tabulate

from mfx.memory import format_bytes


@dataclass(frozen=True)
class Row:
    """One residual add of the model.

    ``status`` is ``"momentum"`` or ``"kept"`` (``reason`` says why), ``kind`` ``"residual"`` or ``"wrapped"``.
    ``shape`` (of x) and ``activation_bytes`` (kept for backward by the original block) need example inputs.
    """

    name: str
    status: str
    reason: str = ""
    kind: str = "residual"
    chain: int | None = None
    parameters: int = 0
    shape: tuple[int, ...] | None = None
    activation_bytes: int | None = None


@dataclass(frozen=True)
class ChainRow:
    """One chain: its blocks, their gammas, and, with example inputs, what its state costs.

    ``snapshots`` are the steps before which the state is kept, ``interval`` the most steps between two kept states;
    ``activation_bytes`` is what the original blocks keep for backward, ``state_bytes`` what the chain keeps in their
    place.  ``drift`` is the relative error that reversing may make (:mod:`mfx.rule.precision`; 0: bit for bit),
    ``rounding`` how far exact arithmetic may move the forward, ``tolerance`` what both stay under.
    ``stored`` says why the chain keeps its activations, if it does, and ``stored_compiled`` why it does so under
    ``torch.compile``.
    """

    index: int
    blocks: tuple[str, ...]
    gammas: tuple[float, ...]
    state_dtype: str | None = None
    snapshots: tuple[int, ...] | None = None
    activation_bytes: int | None = None
    state_bytes: int | None = None
    interval: int | None = None
    drift: float | None = None
    rounding: float | None = None
    tolerance: float | None = None
    stored: str = ""
    stored_compiled: str = ""

    @property
    def break_even(self) -> int | None:
        """From how many blocks like these on a chain with as many states keeps less than the original."""
        if not self.activation_bytes or self.state_bytes is None:
            return None
        return self.state_bytes * len(self.blocks) // self.activation_bytes + 1

    @property
    def pays(self) -> bool | None:
        """Whether the chain keeps less than the original blocks do."""
        if self.activation_bytes is None or self.state_bytes is None:
            return None
        return self.state_bytes < self.activation_bytes


@dataclass(frozen=True)
class Memory:
    """Predicted bytes kept for backward by one training step's forward."""

    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """What would be rewritten; ``str()`` is a table.

    ``blocks`` has a row for each residual add in order of execution, ``rewritable`` the names of those that
    would become momentum steps, ``chains`` a row for each chain; ``memory`` is None without example inputs.
    """

    model: str
    blocks: tuple[Row, ...]
    chains: tuple[ChainRow, ...]
    memory: Memory | None
    _graph: nx.DiGraph = field(repr=False, compare=False)

    @property
    def rewritable(self) -> list[str]:
        """The names of the blocks that would be rewritten."""
        return [row.name for row in self.blocks if row.status == "momentum"]

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON can hold."""
        return {
            "model": self.model,
            "blocks": [_jsonable(asdict(row)) for row in self.blocks],
            "chains": [{**_jsonable(asdict(row)), "break_even": row.break_even} for row in self.chains],
            "memory": None if self.memory is None else asdict(self.memory),
        }

    def to_networkx(self) -> nx.DiGraph:
        """The block graph: a node for each row, an edge where a block's value reaches the next one."""
        return self._graph.copy()

    def __str__(self) -> str:
        if not self.blocks:
            return f"{self.model}: no residual add was found, nothing to rewrite"
        table = tabulate([_cells(row) for row in self.blocks], headers="keys", disable_numparse=True)
        return "\n".join([table, "", *self._summary()])

    def _summary(self) -> Iterator[str]:
        lengths = ", ".join(str(len(chain.blocks)) for chain in self.chains)
        count = f"{len(self.rewritable)} of {len(self.blocks)} residual adds"
        yield f"{self.model}: {count} become momentum steps, in {len(self.chains)} chains" + (
            f" of {lengths} blocks" if lengths else ""
        )
        for chain in self.chains:
            yield from _chain_lines(chain)
        if self.memory is not None:
            before, after = self.memory.before, self.memory.after
            share = f" ({after / before:.0%})" if before else ""
            yield f"kept for backward: {format_bytes(before)} before, {format_bytes(after)} after{share}"


def _cells(row: Row) -> dict[str, object]:
    cells: dict[str, object] = {
        "block": row.name,
        "status": row.status,
        "kind": row.kind,
        "chain": "" if row.chain is None else row.chain,
        "parameters": f"{row.parameters:,}" if row.parameters else "",
    }
    if row.shape is not None:
        cells["x"] = "x".join(map(str, row.shape))
        cells["activations"] = "" if row.activation_bytes is None else format_bytes(row.activation_bytes)
    cells["why kept"] = row.reason
    return cells


def _chain_lines(chain: ChainRow) -> Iterator[str]:
    if len(chain.gammas) == 1 and chain.gammas[0] > 0:
        factor = f"{1 - chain.gammas[0]:.3g}"
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
    if chain.stored_compiled:
        yield f"chain {chain.index}: under torch.compile its activations are stored: {chain.stored_compiled}"


def _head(chain: ChainRow) -> str:
    size = "" if chain.activation_bytes is None else f" {format_bytes(chain.activation_bytes)}"
    return f"chain {chain.index}: {len(chain.blocks)} blocks keep{size or ' their activations'}"


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
