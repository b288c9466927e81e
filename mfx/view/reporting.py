"""Report: what :func:`mfx.momentumize` would rewrite, what it would keep, and why.

The model is captured and planned as for a rewriting and left as it is.  With example inputs the bytes kept
for backward are predicted on fake tensors: before, by interpreting the captured graph; after, by running the
rewritten one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from mfx.budget.owned import Owned, bytes_of, owned_by
from mfx.budget.step import Course
from mfx.find import Block, Found, Rejection
from mfx.graph.notes import SHAPE, STREAMS
from mfx.graph.shapes import Fake, propagate_shapes
from mfx.model.conversion import check_model, require_inputs
from mfx.model.outlook import Outlook, outlooks
from mfx.options import Budget, Gamma, Optimizer, Patterns, RuleName, Velocity, check_optimizer, make_options
from mfx.plan import Chain, Plan
from mfx.view.chained import activation_bytes, chain_rows, link_rows
from mfx.view.footprint import Peaks, StepMemory, peaks_of, step_memory
from mfx.view.rows import ChainRow, Memory, Report, Row, SegmentRow

_NO_OPTIONS = ("model", "example_inputs", "optimizer")


def report(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    gamma: Gamma = 0.9,
    rule: RuleName = "momentum",
    h: float | None = None,
    readout: str = "x",
    granularity: str = "add",
    include: Patterns = None,
    exclude: Patterns = None,
    modules: Patterns = None,
    velocity: Velocity = "zero",
    reversible: bool = True,
    state_dtype: torch.dtype | str = "auto",
    tolerance: float | None = None,
    capture: str = "auto",
    activation_budget: Budget = None,
    optimizer: Optimizer = None,
) -> Report:
    """Which residual blocks of ``model`` can be rewritten, which cannot, and why.

    ``momentumize`` called with the same arguments rewrites exactly the rows whose status is ``"momentum"``.

    Args:
        model: any module that gives one graph; it is not run and not changed.
        example_inputs: tensor, tuple or dict as the model's forward takes them; tensors on the meta device or
            fake ones do, only shapes and dtypes are read.  Adds shapes and bytes.
        gamma, rule, h, readout, granularity, include, exclude, modules, velocity, reversible, state_dtype, tolerance,
            capture, activation_budget: as for :func:`mfx.momentumize`.
        optimizer: counts its state too, so that the report says what a whole step needs: a class of ``torch.optim`` or
            its name (``"AdamW"``), a callable that makes one of parameters, or an optimizer of the model, which is left
            as it is.

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
    options = make_options(**{name: value for name, value in locals().items() if name not in _NO_OPTIONS})
    check_model(model)
    require_inputs(options, example_inputs)
    maker = check_optimizer(optimizer)
    with torch.random.fork_rng(devices=[]):  # a velocity's factory may draw
        found = outlooks(model, options, example_inputs)
        whole = model if "" not in found else found[""].mm  # which may have velocities that are learned
        owned = None if maker is None and example_inputs is None else owned_by(whole, maker)
    return _report_of(type(model).__name__, found, owned)


def _report_of(name: str, found: Mapping[str, Outlook], owned: Owned | None) -> Report:
    """The report on what was captured of a model of this class, which holds what is ``owned``."""
    seen = [_seen(outlook) for outlook in found.values()]
    rows = [row for one in seen for row in _rows(one)]
    own = [chain_rows(one.found, one.plan, one.sizes, one.peaks) for one in seen]
    links = link_rows(list(found.values()), own)
    chains = tuple(row for outlook, rows in zip(found.values(), own, strict=True) for row in _told(outlook, rows))
    memories = [_memory(*each) for each in zip(found.values(), seen, own, strict=True)]
    known = [memory for memory in memories if memory is not None]
    linked = sum(link.state_bytes or 0 for link in links)
    memory = Memory(sum(one.before for one in known), sum(one.after for one in known) + linked) if known else None
    graph = nx.compose_all([_block_graph(rows, one.found) for one in seen])
    segments = tuple(_segment_row(index, one) for one in seen for index in range(len(one.plan.segments)))
    forecasts = [one.plan.forecast for one in seen if one.plan.forecast is not None]
    most = max(forecasts, key=lambda forecast: forecast.peak, default=None)
    step = None if owned is None else _step(found, seen, owned)
    options = next(iter(found.values())).momentum.options
    sums = tuple(_kept_row(row, None, one) for one in seen for row in one.found.sums)
    sharded = tuple(pair for outlook in found.values() for pair in outlook.momentum.sharded.items())
    courses = _courses(seen)
    given = (options.readout, courses, sharded, links)
    return Report(name, tuple(rows), chains, memory, graph, segments, most, step, sums, *given)


def _courses(seen: list[_Seen]) -> dict[str, Course]:
    """How the bytes of a step go up and down, of the part that needs most."""
    most = max((one.peaks for one in seen if one.peaks is not None), key=lambda peaks: peaks.ours.bytes, default=None)
    if most is None:
        return {}
    found = {"plain backprop": most.plain and most.plain.course, "momentum": most.ours.course}
    return {name: course for name, course in found.items() if course is not None}


def _step(found: Mapping[str, Outlook], seen: list[_Seen], owned: Owned) -> StepMemory:
    """What a training step needs; of a model that is captured in parts, without activations."""
    whole = found.get("")
    if whole is None:
        return replace(step_memory(owned), unknown=f"it is captured in parts ({', '.join(found)})")
    if whole.call is None:
        return step_memory(owned)
    inputs, peaks = bytes_of(whole.call.tensors), seen[0].peaks
    if peaks is None:
        return replace(step_memory(owned, inputs), unknown=seen[0].unknown)
    return step_memory(owned, inputs, peaks.ours, peaks.plain)


def _seen(outlook: Outlook) -> _Seen:
    sizes = outlook.entry.captured.sizes
    if outlook.call is not None and not sizes:
        inputs = outlook.entry.captured.inputs(outlook.mm, outlook.call)
        sizes = propagate_shapes(outlook.entry.captured.graph, outlook.mm, inputs)
    return _Seen(outlook.entry.passed.found, outlook.entry.passed.plan, sizes, *peaks_of(outlook))


def _told(outlook: Outlook, rows: Sequence[ChainRow]) -> list[ChainRow]:
    """The rows of an outlook's chains, which say so where these are linked."""
    return [replace(row, linked=outlook.scope is not None) for row in rows]


def _memory(outlook: Outlook, seen: _Seen, rows: Sequence[ChainRow]) -> Memory | None:
    """Bytes kept for backward, as fake tensors predict them; without the states of linked chains."""
    if outlook.call is None or not seen.sizes:
        return None
    inputs = outlook.entry.captured.inputs(outlook.mm, outlook.call)
    after = Fake(outlook.mm, inputs).kept_bytes(outlook.entry.passed.rewritten.run)
    if outlook.scope is not None:
        after = max(0, after - sum(row.state_bytes or 0 for row in rows))
    return Memory(sum(seen.sizes.values()), after)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a report is about; ``sizes`` are the bytes that each node keeps for backward, where they are known."""

    found: Found
    plan: Plan
    sizes: Mapping[fx.Node, int]
    peaks: Peaks | None
    unknown: str

    @cached_property
    def segments(self) -> dict[fx.Node, str]:
        """What is done with the nodes of each segment."""
        rows = zip(self.plan.segments, map(self.plan.treatment, range(len(self.plan.segments))), strict=True)
        return {node: treatment for segment, treatment in rows for node in segment.members}


def _rows(seen: _Seen) -> list[Row]:
    """A row for each residual add, in order of execution."""
    rows = [_momentum_row(chain, step, seen) for chain in seen.plan.chains for step in range(len(chain.blocks))]
    blocks = {block.name: block for block in seen.found.blocks}
    rows += [_kept_row(rejection, blocks.get(rejection.name), seen) for rejection in seen.plan.rejections]
    order = {name: index for index, name in enumerate(_names_in_order(seen.found))}
    return sorted(rows, key=lambda row: order[row.name])


def _names_in_order(found: Found) -> list[str]:
    position = found.flow.position
    return [name for _, name in sorted((position[end], name) for end, name in _ends(found))]


def _ends(found: Found) -> list[tuple[fx.Node, str]]:
    """The nodes that all residual adds end in (two may end in one), with their names."""
    return [(row.add if isinstance(row, Rejection) else row.output, row.name) for row in found.rows]


def _momentum_row(chain: Chain, step: int, seen: _Seen) -> Row:
    block = chain.blocks[step]
    return Row(
        name=block.name,
        status="momentum",
        kind=block.kind,
        chain=chain.number,
        parameters=_parameter_count(block.members, seen.found),
        shape=block.skip.meta.get(SHAPE),
        streams=tuple(node.meta.get(SHAPE, ()) for node in block.skip.meta.get(STREAMS, ())),
        adds=block.adds,
        activation_bytes=activation_bytes(block, seen.sizes),
        treatment=_treatment(chain, step, seen),
    )


def _treatment(chain: Chain, step: int, seen: _Seen) -> str:
    """What a budget does with the activations of a block."""
    if seen.plan.forecast is None:
        return ""
    if chain.plain:
        return _outside_chains(chain.blocks[step].output, seen)
    if step in chain.kept or not chain.way.reversible:
        return "keep"
    return "recompute" if chain.rules[step].forgets else "reverse"


def _outside_chains(node: fx.Node, seen: _Seen) -> str:
    if seen.plan.forecast is None:
        return ""
    return seen.segments.get(node, "keep")


def _segment_row(index: int, seen: _Seen) -> SegmentRow:
    segment = seen.plan.segments[index]
    saved = activation_bytes(segment, seen.sizes) or 0
    return SegmentRow(segment.name, len(segment.members), saved, seen.plan.treatment(index))


def _kept_row(rejection: Rejection, block: Block | None, seen: _Seen) -> Row:
    return Row(
        name=rejection.name,
        status="kept",
        reason=rejection.text,
        kind="residual" if block is None else block.kind,
        parameters=0 if block is None else _parameter_count(block.members, seen.found),
        shape=rejection.add.meta.get(SHAPE),
        adds=1 if block is None else block.adds,
        activation_bytes=None if block is None else activation_bytes(block, seen.sizes),
        treatment=_outside_chains(rejection.add, seen),
    )


def _parameter_count(members: tuple[fx.Node, ...], found: Found) -> int:
    root = found.flow.root
    parameters: dict[int, int] = {}
    for node in members:
        if node.op == "call_module":
            parameters.update({id(p): p.numel() for p in root.get_submodule(str(node.target)).parameters()})
        elif node.op == "get_attr" and found.flow.has_parameters(node):
            parameter = root.get_parameter(str(node.target))
            parameters[id(parameter)] = parameter.numel()
    return sum(parameters.values())


def _block_graph(rows: list[Row], found: Found) -> nx.DiGraph:
    """Rows as nodes; an edge where one block's value reaches another without passing a third."""
    graph = nx.DiGraph()
    graph.add_nodes_from((row.name, asdict(row)) for row in rows)
    ends = dict(_ends(found))
    reached: dict[fx.Node, frozenset[str]] = {}
    for node in found.flow.nodes:
        before = frozenset[str]().union(*(reached[source] for source in node.all_input_nodes))
        if node in ends:
            graph.add_edges_from((name, ends[node]) for name in before)
            before = frozenset({ends[node]})
        reached[node] = before
    return graph
