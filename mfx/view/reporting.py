"""Report: what :func:`mfx.momentumize` would rewrite, what it would keep, and why.

The model is captured and planned as for a rewriting and left as it is.  With example inputs the bytes kept
for backward are predicted on fake tensors: before, by interpreting the captured graph; after, by running the
rewritten one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from mfx.find import Block, Found, Rejection
from mfx.graph.notes import DTYPE, SHAPE
from mfx.graph.shapes import Fake, propagate_shapes
from mfx.model.conversion import check_model
from mfx.model.outlook import Outlook, outlooks
from mfx.options import Gamma, Patterns, Velocity, make_options
from mfx.plan import Chain, Plan
from mfx.run.conditions import autocast_dtype
from mfx.torch_versions import has_float64
from mfx.view.rows import ChainRow, Memory, Report, Row


def report(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    gamma: Gamma = 0.9,
    include: Patterns = None,
    exclude: Patterns = None,
    modules: Patterns = None,
    velocity: Velocity = "zero",
    reversible: bool = True,
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
        gamma, include, exclude, modules, velocity, reversible, state_dtype, tolerance, capture: as for
            :func:`mfx.momentumize`.

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
        velocity=velocity,
        reversible=reversible,
        state_dtype=state_dtype,
        tolerance=tolerance,
        capture=capture,
    )
    check_model(model)
    with torch.random.fork_rng(devices=[]):  # a velocity's factory may draw
        found = outlooks(model, options, example_inputs)
    seen = [_seen(outlook) for outlook in found.values()]
    rows = [row for one in seen for row in _rows(one)]
    chains = tuple(_chain_row(chain, one) for one in seen for chain in one.plan.chains)
    memories = [_memory(outlook, one) for outlook, one in zip(found.values(), seen, strict=True)]
    known = [memory for memory in memories if memory is not None]
    memory = Memory(sum(one.before for one in known), sum(one.after for one in known)) if known else None
    graph = nx.compose_all([_block_graph(rows, one.found) for one in seen])
    return Report(type(model).__name__, tuple(rows), chains, memory, graph)


def _seen(outlook: Outlook) -> _Seen:
    sizes = outlook.entry.captured.sizes
    if outlook.call is not None and not sizes:
        inputs = outlook.entry.captured.inputs(outlook.mm, outlook.call)
        sizes = propagate_shapes(outlook.entry.captured.graph, outlook.mm, inputs)
    return _Seen(outlook.entry.passed.found, outlook.entry.passed.plan, sizes)


def _memory(outlook: Outlook, seen: _Seen) -> Memory | None:
    """Bytes kept for backward, as fake tensors predict them."""
    if outlook.call is None or not seen.sizes:
        return None
    inputs = outlook.entry.captured.inputs(outlook.mm, outlook.call)
    after = Fake(outlook.mm, inputs).kept_bytes(outlook.entry.passed.rewritten.run)
    return Memory(sum(seen.sizes.values()), after)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a report is about; ``sizes`` are the bytes that each node keeps for backward, where they are known."""

    found: Found
    plan: Plan
    sizes: Mapping[fx.Node, int]


def _rows(seen: _Seen) -> list[Row]:
    """A row for each residual add, in order of execution."""
    rows = [_momentum_row(chain, block, seen) for chain in seen.plan.chains for block in chain.blocks]
    rows += [_kept_row(rejection, seen) for rejection in seen.plan.rejections]
    order = {name: index for index, name in enumerate(_names_in_order(seen.found))}
    return sorted(rows, key=lambda row: order[row.name])


def _names_in_order(found: Found) -> list[str]:
    position = found.flow.position
    ends = [(position[block.output], block.name) for block in found.blocks]
    ends += [(position[rejection.add], rejection.name) for rejection in found.rejections]
    return [name for _, name in sorted(ends)]


def _momentum_row(chain: Chain, block: Block, seen: _Seen) -> Row:
    return Row(
        name=block.name,
        status="momentum",
        kind=block.kind,
        chain=chain.number,
        parameters=_parameter_count(block.members, seen.found),
        shape=block.skip.meta.get(SHAPE),
        activation_bytes=_activation_bytes(block, seen),
    )


def _kept_row(rejection: Rejection, seen: _Seen) -> Row:
    block = next((block for block in seen.found.blocks if block.name == rejection.name), None)
    return Row(
        name=rejection.name,
        status="kept",
        reason=rejection.text,
        kind="residual" if block is None else block.kind,
        parameters=0 if block is None else _parameter_count(block.members, seen.found),
        shape=rejection.add.meta.get(SHAPE),
        activation_bytes=None if block is None else _activation_bytes(block, seen),
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


def _activation_bytes(block: Block, seen: _Seen) -> int | None:
    if not seen.sizes:
        return None
    return sum(seen.sizes.get(node, 0) for node in {*block.nodes, block.output})


def _chain_row(chain: Chain, seen: _Seen) -> ChainRow:
    dtype: torch.dtype | None = chain.input.meta.get(DTYPE)
    row = ChainRow(
        chain.number, chain.names, chain.gammas, stored=chain.eager.text, stored_compiled=chain.compiled.text
    )
    if dtype is None or not seen.sizes:
        return row
    row = replace(row, activation_bytes=sum(_activation_bytes(block, seen) or 0 for block in chain.blocks))
    if not chain.eager.reversible:
        return row
    device = next((parameter.device for parameter in seen.found.flow.root.parameters()), torch.device("cpu"))
    schedule = chain.schedule(dtype, autocast_dtype(device, dtype), float64=has_float64(device))
    steps = len(chain.blocks)
    return replace(
        row,
        state_dtype=str(schedule.state_dtype).removeprefix("torch."),
        snapshots=schedule.snapshots,
        state_bytes=schedule.bytes_an_element(steps) * math.prod(chain.input.meta[SHAPE]),
        interval=schedule.interval(steps),
        drift=schedule.drift,
        rounding=schedule.rounding,
        tolerance=schedule.tolerance,
    )


def _block_graph(rows: list[Row], found: Found) -> nx.DiGraph:
    """Rows as nodes; an edge where one block's value reaches another without passing a third."""
    graph = nx.DiGraph()
    graph.add_nodes_from((row.name, asdict(row)) for row in rows)
    ends = {block.output: block.name for block in found.blocks}
    ends |= {rejection.add: rejection.name for rejection in found.rejections}
    reached: dict[fx.Node, frozenset[str]] = {}
    for node in found.flow.nodes:
        before = frozenset[str]().union(*(reached[source] for source in node.all_input_nodes))
        if node in ends:
            graph.add_edges_from((name, ends[node]) for name in before)
            before = frozenset({ends[node]})
        reached[node] = before
    return graph
