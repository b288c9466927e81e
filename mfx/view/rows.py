"""Rows: the value that a report is, and how it looks as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
from tabulate import tabulate

from mfx.budget.step import Course
from mfx.memory import format_bytes
from mfx.plan import Forecast
from mfx.view.footprint import StepMemory
from mfx.view.lines import chain_lines, forecast_lines, lag_lines, sharded_lines
from mfx.view.linking import LinkRow
from mfx.view.pictures import drawn_blocks, drawn_step, fragment, saved


@dataclass(frozen=True)
class Row:
    """One residual add of the model.

    ``status`` is ``"momentum"`` or ``"kept"`` (``reason`` says why), ``kind`` ``"residual"`` or ``"wrapped"``.
    ``shape`` (of x) and ``activation_bytes`` (kept for backward by the original block) need example inputs.
    Where several streams are one state, ``streams`` are the shapes of each.
    ``treatment`` is what a budget does with its activations: ``"keep"``, ``"reverse"`` or ``"recompute"``; ``adds`` how
    many residual adds a layer has that is taken whole.
    """

    name: str
    status: str
    reason: str = ""
    kind: str = "residual"
    chain: int | None = None
    parameters: int = 0
    shape: tuple[int, ...] | None = None
    activation_bytes: int | None = None
    streams: tuple[tuple[int, ...], ...] = ()
    treatment: str = ""
    adds: int = 1


@dataclass(frozen=True)
class ChainRow:
    """One chain: its blocks, their gammas (how much of the velocity a step leaves) and rules, and, with example inputs,
    what its state costs.

    ``pull`` is the factor of the first block's branch, ``lag`` by how many blocks the state that branches read lags
    behind where it would come to rest; None where it never does.
    ``snapshots`` are the steps before which the state is kept, ``interval`` the most steps between two kept states;
    ``activation_bytes`` is what the original blocks keep for backward, ``state_bytes`` what the chain keeps in their
    place.  ``drift`` is the relative error that reversing may make (:mod:`mfx.rule.arithmetic.precision`; 0: bit for
    bit), ``rounding`` how far exact arithmetic may move the forward, ``tolerance`` what both stay under.
    ``checkpoint_bytes`` is what a checkpoint around each block would keep, ``work`` what the blocks' forward takes (in
    FLOPs, with memory moved counted at a rate), ``free`` whether keeping activations leaves the peak where it is.
    ``stored`` says why the chain keeps its activations, if it does.  A ``linked`` chain has its state in common with
    others (:class:`LinkRow`), so that nothing is said here of what it costs.
    """

    index: int
    blocks: tuple[str, ...]
    gammas: tuple[float, ...]
    rules: tuple[str, ...] = ()
    pull: float = 1.0
    lag: float | None = 0.0
    state_dtype: str | None = None
    snapshots: tuple[int, ...] | None = None
    activation_bytes: int | None = None
    state_bytes: int | None = None
    interval: int | None = None
    drift: float | None = None
    rounding: float | None = None
    tolerance: float | None = None
    stored: str = ""
    checkpoint_bytes: int | None = None
    work: float | None = None
    free: bool = False
    linked: bool = False

    @property
    def advice(self) -> str:
        """What does better: ``"keep"``, ``"checkpoint"`` or ``"reverse"``; empty where that is not known."""
        if self.linked or self.state_bytes is None or self.checkpoint_bytes is None or self.snapshots is None:
            return ""
        if self.free or not self.pays:
            return "keep"
        inverted = len(self.snapshots) < len(self.blocks)
        better = self.checkpoint_bytes - self.state_bytes < (1 if inverted else 0)
        return "checkpoint" if better else "reverse"

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
class SegmentRow:
    """Operations outside of chains that a budget has recomputed; ``saved_bytes`` are what they would keep.

    What they are recomputed from waits on the host, where the ``treatment`` is "offload".
    """

    name: str
    operations: int
    saved_bytes: int
    treatment: str


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
    Under an ``activation_budget``, ``segments`` has a row for each piece outside of chains that is recomputed, each
    block a ``treatment``, and ``forecast`` the peak of a training step (of the part that needs most, where a model is
    captured in parts).  ``step`` is all that a training step has alive, with example inputs or an optimizer.
    ``readout`` is what chains hand out.
    ``sums`` are those that are no residual adds (of rotary embeddings, say); the table leaves them out.
    ``courses`` are the bytes alive along a step, of plain backprop and of momentum.
    ``sharded`` are the modules that are one step because torch.distributed runs code around their calls (fully_shard),
    each with the number of residual blocks in it.
    ``links`` has a row for chains that the model's own Python joins, where that cannot be captured.
    """

    model: str
    blocks: tuple[Row, ...]
    chains: tuple[ChainRow, ...]
    memory: Memory | None
    _graph: nx.DiGraph = field(repr=False, compare=False)
    segments: tuple[SegmentRow, ...] = ()
    forecast: Forecast | None = None
    step: StepMemory | None = None
    sums: tuple[Row, ...] = ()
    readout: str = "x"
    courses: dict[str, Course] = field(default_factory=dict, repr=False, compare=False)
    sharded: tuple[tuple[str, int], ...] = ()
    links: tuple[LinkRow, ...] = ()

    @property
    def rewritable(self) -> list[str]:
        """The names of the blocks that would be rewritten."""
        return [row.name for row in self.blocks if row.status == "momentum"]

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON can hold."""
        return {
            "model": self.model,
            "blocks": [_jsonable(asdict(row)) for row in self.blocks],
            "chains": [
                {**_jsonable(asdict(row)), "break_even": row.break_even, "advice": row.advice} for row in self.chains
            ],
            "memory": None if self.memory is None else asdict(self.memory),
            "segments": [asdict(row) for row in self.segments],
            "forecast": None if self.forecast is None else asdict(self.forecast),
            "step": None if self.step is None else asdict(self.step),
            "readout": self.readout,
            "sharded": dict(self.sharded),
            "sums": [_jsonable(asdict(row)) for row in self.sums],
            "links": [_jsonable(asdict(row)) for row in self.links],
        }

    def to_networkx(self) -> nx.DiGraph:
        """The block graph: a node for each row, an edge where a block's value reaches the next one."""
        return self._graph.copy()

    def draw(self) -> Any:
        """A matplotlib figure: the blocks with their chains, their bytes, and why others are kept.

        Example:
            >>> import torchvision, mfx
            >>> found = mfx.report(torchvision.models.resnet18(weights=None))
            >>> found.draw().get_suptitle()
            'ResNet: 5 of 8 residual adds become momentum steps'
        """
        return drawn_blocks(self)

    def draw_step(self) -> Any:
        """A matplotlib figure: the bytes alive along one training step, plain backprop beside momentum.

        Raises:
            OptionError: the report was made without example inputs.
        """
        return drawn_step(self)

    def save(self, path: str | Path) -> None:
        """Write the report as a page (.html, with the pictures), a picture of the blocks (.svg, .png), or .json."""
        saved(self, path)

    def _repr_html_(self) -> str:
        return fragment([_cells(row) for row in self.blocks], [row.chain for row in self.blocks], [*self._summary()])

    def __str__(self) -> str:
        if not self.blocks and self.forecast is None and self.step is None:
            return f"{self.model}: no residual add was found, nothing to rewrite"
        table = tabulate([_cells(row) for row in self.blocks], headers="keys", disable_numparse=True)
        return "\n".join([table, "", *self._summary()])

    def _summary(self) -> Iterator[str]:
        lengths = ", ".join(str(len(chain.blocks)) for chain in self.chains)
        adds = sum(row.adds for row in self.blocks if row.status == "momentum")
        count = f"{adds} of {sum(row.adds for row in self.blocks)} residual adds"
        yield f"{self.model}: {count} become momentum steps, in {len(self.chains)} chains" + (
            f" of {lengths} blocks" if lengths else ""
        )
        whole = [row.adds for row in self.blocks if row.adds > 1]
        if whole:
            yield f"{len(whole)} blocks are whole layers, F(x) = layer(x) - x, of {sum(whole)} residual adds"
        for chain in self.chains:
            yield from () if chain.linked else chain_lines(chain)
        yield from (link.line for link in self.links)
        yield from lag_lines(self.chains, self.readout)
        yield from sharded_lines(self.sharded)
        if self.memory is not None:
            before, after = self.memory.before, self.memory.after
            share = f" ({after / before:.0%})" if before else ""
            yield f"kept for backward: {format_bytes(before)} before, {format_bytes(after)} after{share}"
        yield from (
            f"recomputed: {row.name}, {row.operations} operations, {format_bytes(row.saved_bytes)}"
            + (", from inputs on the host" if row.treatment == "offload" else "")
            for row in self.segments
        )
        if self.forecast is not None:
            yield from forecast_lines(self.forecast)
        if self.step is not None:
            if self.forecast is None and self.step.where:
                yield f"most is alive at: {self.step.where}"
            yield ""
            yield from self.step.lines()


def _cells(row: Row) -> dict[str, object]:
    cells: dict[str, object] = {
        "block": row.name,
        "status": row.status,
        "kind": row.kind,
        "chain": "" if row.chain is None else row.chain,
        "parameters": f"{row.parameters:,}" if row.parameters else "",
    }
    if row.shape is not None:
        cells["x"] = ", ".join("x".join(map(str, shape)) for shape in row.streams or (row.shape,))
        cells["activations"] = "" if row.activation_bytes is None else format_bytes(row.activation_bytes)
    if row.treatment:
        cells["backward"] = row.treatment
    cells["why kept"] = row.reason
    return cells


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}
