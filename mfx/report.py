"""Report: what :func:`mfx.momentumize` would rewrite, what it would keep, and why.

The model is captured and planned as for a rewriting and left as it is.  With example inputs the bytes kept
for backward are predicted on fake tensors: before, by interpreting the captured graph; after, by running the
rewritten one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from tabulate import tabulate
from torch import fx, nn

from mfx.block import Block, Rejection
from mfx.capture import as_call
from mfx.dataflow import SHAPE
from mfx.model import Momentum, check_model
from mfx.options import Gamma, Patterns, make_options
from mfx.pipeline import Entry
from mfx.plan import Chain
from mfx.recompute import autocast_dtype
from mfx.shapes import DTYPE, Fake, propagate_shapes


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
    place.  ``drift`` is the relative error that reversing may make by the model of :mod:`mfx.precision` (0: bit for
    bit), ``rounding`` how far exact arithmetic may move the forward, ``tolerance`` what both stay under.
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


def report(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    gamma: Gamma = 0.9,
    include: Patterns = None,
    exclude: Patterns = None,
    modules: Patterns = None,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
    capture: str = "auto",
) -> Report:
    """Which residual blocks of ``model`` can be rewritten, which cannot, and why.

    ``momentumize`` called with the same arguments rewrites exactly the rows whose status is ``"momentum"``.

    Args:
        model: any module that gives one graph; it is not run and not changed.
        example_inputs: tensor, tuple or dict as the model's forward takes them; tensors on the meta device or
            fake ones do, only shapes and dtypes are read.  Adds shapes and bytes.
        gamma, include, exclude, modules, state_dtype, tolerance, capture: as for :func:`mfx.momentumize`.

    Returns:
        A :class:`Report`.

    Raises:
        OptionError, InputTypeError, CaptureError: as :func:`mfx.momentumize`.

    Example:
        >>> import torchvision, mfx
        >>> found = mfx.report(torchvision.models.resnet18(weights=None))
        >>> found.rewritable
        ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1', 'layer4.1']
        >>> found.blocks[2].reason
        'the skip path transforms x (through layer2_0_downsample_1)'
    """
    options = make_options(
        gamma,
        include=include,
        exclude=exclude,
        modules=modules,
        state_dtype=state_dtype,
        tolerance=tolerance,
        capture=capture,
    )
    check_model(model)
    options = replace(options, shapes=example_inputs is not None)
    entry = Momentum(type(model), options).first(model, example_inputs)
    inputs = None if example_inputs is None else entry.capture.inputs(model, *as_call(example_inputs))
    if inputs is not None and not entry.sizes:
        entry = replace(entry, sizes=propagate_shapes(entry.capture.graph, model, inputs))
    rows = [_momentum_row(chain, block, entry) for chain in entry.plan.chains for block in chain.blocks]
    rows += [_kept_row(rejection, entry) for rejection in entry.plan.rejections]
    order = {name: index for index, name in enumerate(_names_in_order(entry))}
    rows.sort(key=lambda row: order[row.name])
    memory = None
    if entry.sizes and inputs is not None:
        after = Fake(model, inputs).kept_bytes(entry.rewritten.run)
        memory = Memory(sum(entry.sizes.values()), after)
    chains = tuple(_chain_row(chain, entry) for chain in entry.plan.chains)
    return Report(type(model).__name__, tuple(rows), chains, memory, _block_graph(rows, entry))


def _names_in_order(entry: Entry) -> list[str]:
    position = entry.found.flow.position
    ends = [(position[block.output], block.name) for block in entry.found.blocks]
    ends += [(position[rejection.add], rejection.name) for rejection in entry.found.rejections]
    return [name for _, name in sorted(ends)]


def _momentum_row(chain: Chain, block: Block, entry: Entry) -> Row:
    return Row(
        name=block.name,
        status="momentum",
        kind=block.kind,
        chain=chain.index,
        parameters=_parameter_count(block.members, entry),
        shape=block.skip.meta.get(SHAPE),
        activation_bytes=_activation_bytes(block, entry),
    )


def _kept_row(rejection: Rejection, entry: Entry) -> Row:
    block = next((block for block in entry.found.blocks if block.name == rejection.name), None)
    return Row(
        name=rejection.name,
        status="kept",
        reason=rejection.text,
        kind="residual" if block is None else block.kind,
        parameters=0 if block is None else _parameter_count(block.members, entry),
        shape=rejection.add.meta.get(SHAPE),
        activation_bytes=None if block is None else _activation_bytes(block, entry),
    )


def _parameter_count(members: tuple[fx.Node, ...], entry: Entry) -> int:
    root = entry.found.flow.root
    parameters: dict[int, int] = {}
    for node in members:
        if node.op == "call_module":
            parameters.update({id(p): p.numel() for p in root.get_submodule(str(node.target)).parameters()})
        elif node.op == "get_attr" and entry.found.flow.has_parameters(node):
            parameter = root.get_parameter(str(node.target))
            parameters[id(parameter)] = parameter.numel()
    return sum(parameters.values())


def _activation_bytes(block: Block, entry: Entry) -> int | None:
    if not entry.sizes:
        return None
    return sum(entry.sizes.get(node, 0) for node in {*block.nodes, block.output})


def _chain_row(chain: Chain, entry: Entry) -> ChainRow:
    dtype: torch.dtype | None = chain.input.meta.get(DTYPE)
    if dtype is None or not entry.sizes:
        return ChainRow(chain.index, chain.names, chain.gammas)
    device = next((parameter.device for parameter in entry.found.flow.root.parameters()), torch.device("cpu"))
    schedule = chain.schedule(dtype, autocast_dtype(device, dtype))
    steps = len(chain.blocks)
    return ChainRow(
        chain.index,
        chain.names,
        chain.gammas,
        str(schedule.state_dtype).removeprefix("torch."),
        schedule.snapshots,
        sum(_activation_bytes(block, entry) or 0 for block in chain.blocks),
        schedule.bytes_an_element(steps) * math.prod(chain.input.meta[SHAPE]),
        schedule.interval(steps),
        schedule.drift,
        schedule.rounding,
        schedule.tolerance,
    )


def _block_graph(rows: list[Row], entry: Entry) -> nx.DiGraph:
    """Rows as nodes; an edge where one block's value reaches another without passing a third."""
    graph = nx.DiGraph()
    graph.add_nodes_from((row.name, asdict(row)) for row in rows)
    ends = {block.output: block.name for block in entry.found.blocks}
    ends |= {rejection.add: rejection.name for rejection in entry.found.rejections}
    reached: dict[fx.Node, frozenset[str]] = {}
    for node in entry.found.flow.nodes:
        before = frozenset[str]().union(*(reached[source] for source in node.all_input_nodes))
        if node in ends:
            graph.add_edges_from((name, ends[node]) for name in before)
            before = frozenset({ends[node]})
        reached[node] = before
    return graph


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
    if chain.state_bytes is None or chain.activation_bytes is None or chain.snapshots is None:
        return
    snapshots = f", {len(chain.snapshots)} snapshots, {chain.interval} steps apart at most" if chain.snapshots else ""
    drift = f"drift up to {chain.drift:.0e}" if chain.drift else "no drift"
    line = (
        f"chain {chain.index}: {len(chain.blocks)} blocks keep {format_bytes(chain.activation_bytes)}, as momentum "
        f"{format_bytes(chain.state_bytes)} (state in {chain.state_dtype}{snapshots}, {drift})"
    )
    if chain.pays:
        yield line
    else:
        yield f"{line}; it does not pay before {chain.break_even} such blocks: exclude them to save time"


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()}


def format_bytes(size: int) -> str:
    """A size in the unit that suits it.

    >>> format_bytes(3 * 1024 * 1024)
    '3.0 MiB'
    """
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
