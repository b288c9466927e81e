"""Blocks: a line for each residual add of a report, in order, with its chain, its bytes, or why it is kept.

On the left the blocks as a graph (:mod:`networkx`), on the right what each keeps for backward in the original model
(without example inputs: its parameters).  Of long runs of blocks of one chain the first and last ones are shown.

Known limits: beyond some hundred kept blocks the picture is tall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import networkx as nx

from mfx.memory import format_bytes
from mfx.view.pictures.canvas import INK, bare, colour_of, figure

_SHOWN = 8
"""The most blocks of a run that are shown one by one."""


@dataclass(frozen=True)
class _Line:
    """One block, or several in the middle of a run, with the size of one of them."""

    text: str
    chain: int | None
    size: int
    note: str
    names: tuple[str, ...]


def drawn_blocks(report: Any) -> Any:
    """A matplotlib figure of the blocks of a :class:`mfx.Report`."""
    known = any(row.activation_bytes is not None for row in report.blocks)
    lines = _lines(report.blocks, known)
    canvas = figure(10, 1.3 + 0.24 * len(lines) + 0.2 * len(report.chains))
    left, right = canvas.subplots(1, 2, sharey=True, width_ratios=(1, 6))
    _draw_graph(left, lines, report.to_networkx())
    _draw_sizes(right, lines, known)
    left.set_yticks([-place for place in range(len(lines))], [line.text for line in lines], fontsize=8)
    left.tick_params(length=0, labelleft=True)
    left.set_ylim(-len(lines) + 0.4, 0.6)
    canvas.suptitle(_title(report), fontsize=11, color=INK)
    handles = [left.scatter([], [], s=45, color=colour_of(chain.index)) for chain in report.chains]
    labels = [_legend(chain) for chain in report.chains]
    canvas.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8)
    return canvas


def _lines(blocks: Sequence[Any], known: bool) -> list[_Line]:
    """The lines of the picture: the middle of a long run is one."""
    found: list[_Line] = []
    for _, group in groupby(blocks, key=lambda row: (row.chain, row.reason if row.status == "kept" else "")):
        rows = list(group)
        if len(rows) <= _SHOWN:
            found += [_line([row], known) for row in rows]
        else:
            found += [_line([row], known) for row in rows[:3]]
            found += [_line(rows[3:-2], known), *(_line([row], known) for row in rows[-2:])]
    return found


def _line(rows: Sequence[Any], known: bool) -> _Line:
    sizes = [(row.activation_bytes if known else row.parameters) or 0 for row in rows]
    text = rows[0].name if len(rows) == 1 else f"... {len(rows)} more"
    each = "each" if len(rows) > 1 and any(sizes) else ""
    note = "   ".join(filter(None, (each, rows[0].reason)))
    return _Line(text, rows[0].chain, sum(sizes) // len(rows), note, tuple(row.name for row in rows))


def _draw_graph(axes: Any, lines: Sequence[_Line], graph: nx.DiGraph) -> None:
    place = {name: index for index, line in enumerate(lines) for name in line.names}
    small = nx.DiGraph()
    small.add_nodes_from(range(len(lines)))
    small.add_edges_from((place[a], place[b]) for a, b in graph.edges if place[a] != place[b])
    positions = {index: (0.0, -float(index)) for index in small}
    colours = [colour_of(lines[index].chain) for index in small]
    nx.draw_networkx_nodes(small, positions, node_size=45, node_color=colours, ax=axes)
    for bent in (False, True):
        edges = [(a, b) for a, b in small.edges if (b - a != 1) is bent]
        style = f"arc3,rad={-0.35 if bent else 0}"
        look = {"arrowsize": 6, "edge_color": "#8a929b", "width": 0.8, "node_size": 45, "connectionstyle": style}
        nx.draw_networkx_edges(small, positions, edgelist=edges, ax=axes, **look)  # type: ignore[arg-type]
    axes.set_xlim(-0.6, 0.6)
    axes.tick_params(bottom=False, labelbottom=False)
    bare(axes, "top", "right", "bottom", "left")


def _draw_sizes(axes: Any, lines: Sequence[_Line], known: bool) -> None:
    unit = 2**20 if known else 1e6
    sizes = [line.size / unit for line in lines]
    places = [-index for index in range(len(lines))]
    axes.barh(places, sizes, height=0.62, color=[colour_of(line.chain) for line in lines])
    most = max([*sizes, 1e-9])
    for place, line, size in zip(places, lines, sizes, strict=True):
        text = format_bytes(line.size) if known else f"{line.size:,}"
        shown = "   ".join(filter(None, (text if line.size else "", line.note)))
        axes.text(size + 0.01 * most, place, shown, va="center", fontsize=7.5, color=INK)
    axes.set_xlim(0, 1.6 * most)
    axes.set_xlabel("kept for backward by the original block (MiB)" if known else "parameters (millions)", fontsize=9)
    axes.tick_params(labelleft=False, left=False, labelsize=8)
    bare(axes, "top", "right")


def _title(report: Any) -> str:
    title = f"{report.model}: {len(report.rewritable)} of {len(report.blocks)} residual adds become momentum steps"
    if report.memory is None:
        return title
    before, after = format_bytes(report.memory.before), format_bytes(report.memory.after)
    return f"{title}; kept for backward {before} before, {after} after"


def _legend(chain: Any) -> str:
    gammas = sorted(set(chain.gammas))
    shown = f"{gammas[0]:g}" if len(gammas) == 1 else f"{gammas[0]:g} to {gammas[-1]:g}"
    count = "1 block" if len(chain.blocks) == 1 else f"{len(chain.blocks)} blocks"
    text = f"chain {chain.index}: {count}, gamma {shown}"
    if chain.activation_bytes is None or chain.state_bytes is None:
        return text
    plain, ours = format_bytes(chain.activation_bytes), format_bytes(chain.state_bytes)
    return f"{text}, {plain} kept as they are, {ours} as momentum"
