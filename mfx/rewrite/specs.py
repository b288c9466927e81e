"""Specs: from the chains of a plan to what running them needs, each branch a graph and a function of its own.

``branch(root, x, *sides)`` takes the root module first and names parameters, buffers and modules by path; it owns
nothing (M4).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from mfx.find import Block
from mfx.graph.dataflow import Dataflow, get_attribute
from mfx.graph.notes import GIVEN, MODES, SCOPE, SHAPE
from mfx.graph.resources import moves_statistics, running_statistics
from mfx.graph.sums import Add
from mfx.plan import Chain
from mfx.rewrite.code import compile_graph
from mfx.rewrite.compiled import Branches, in_traces
from mfx.rewrite.switches import Switches, has_switches
from mfx.rule import Momentum, Rule, StepSpec
from mfx.rule.arithmetic.carry import EAGER
from mfx.rule.step import Escape, State
from mfx.run import ChainSpec


def spec_of(chain: Chain, flow: Dataflow, branches: Branches | None = None) -> ChainSpec:
    """What running ``chain`` needs; ``branches`` compile its branches, where they are to be compiled."""
    inside = {node for block in chain.blocks for node in block.nodes}
    values: dict[fx.Node, State | Escape] = {}
    steps = []
    for index, (block, rule) in enumerate(zip(chain.blocks, chain.rules, strict=True)):
        steps.append(_step(block, rule, values, flow, branches))
        values[block.output] = State(index)
        values.update({node: Escape(index, number) for number, node in enumerate(block.escapes)})
    handed = (chain.output, *chain.taps, *chain.escapes)
    taps = [values[tap] for tap in chain.taps]
    return ChainSpec(
        name=f"momentum_{chain.number}",
        index=chain.index,
        steps=tuple(steps),
        schedule=chain.schedule,
        taps=tuple(tap.step for tap in taps),
        reads_z=chain.readout == "z",
        copied=frozenset(i for i, value in enumerate(handed) if _overwritten(value, inside, flow)),
        reversible=chain.way.reversible,
        kept=chain.kept,
        opens=chain.input.op == "placeholder",
        leaves=any(user.op == "output" for user in chain.output.users),
        kernels=EAGER if branches is None else branches.kernels,
    )


def segment_spec(
    segment: Block, flow: Dataflow, offloaded: int | None = None, branches: Branches | None = None
) -> StepSpec:
    """What running a segment needs; no rule is asked for."""
    return replace(_step(segment, Momentum(0.0), {}, flow, branches), offloaded=offloaded)


def _overwritten(value: fx.Node, inside: set[fx.Node], flow: Dataflow) -> bool:
    """Whether code outside the chain writes to a value that is handed out."""
    return any(writer not in inside for writer in flow.writers.get(flow.memory[value], ()))


def _step(
    block: Block, rule: Rule, values: dict[fx.Node, State | Escape], flow: Dataflow, branches: Branches | None
) -> StepSpec:
    modules = dict.fromkeys(str(node.target) for node in block.members if node.op == "call_module")
    attributes = [str(node.target) for node in block.members if node.op == "get_attr"]
    moved = _running_statistics(block)
    read = [str(node.target) for node in block.members if node.op == "get_attr" and node not in moved]
    buffers = [path for path in read if _is_buffer(flow.root, path)]
    statistics = tuple(number for number, side in enumerate(block.sides) if side in moved)
    return StepSpec(
        name=block.name,
        rule=rule,
        wrapped=block.kind == "wrapped",
        scale=block.scale,
        written=block.written,
        sides=tuple(values.get(side) for side in block.sides),
        parameters=_parameters(flow.root, modules, attributes),
        modules=tuple(modules),
        buffers=tuple(dict.fromkeys(split_path(path) for path in buffers)),
        statistics=statistics,
        draws=any(flow.may_draw(node) for node in block.members),
        sees_grad_mode=any(flow.sees_grad_mode(node) for node in block.members),
        branch_first=block.branch_first,
        escapes=len(block.escapes),
        home=block.output.meta[SCOPE].path if SCOPE in block.output.meta else "",
        **_traced(block.name, _functions(block, flow, moved, branches)),
    )


def _traced(name: str, functions: dict[str, Any]) -> dict[str, Any]:
    """The branch's functions by the block's name in the traces of a profiler."""
    branch, again = functions["branch"], functions["again"]
    named = {"branch": in_traces(f"mfx {name}", branch), "again": in_traces(f"mfx {name} again", again)}
    return {**functions, **named}


def _functions(block: Block, flow: Dataflow, moved: set[fx.Node], branches: Branches | None) -> dict[str, Any]:
    """The branch as functions, compiled or not; and what it may yet be compiled from."""
    graph = branch_graph(block, flow)
    copied = _moved_in(graph, block, moved)
    fixed = has_switches(graph)  # Dynamo follows no switch of modes
    if branches is not None and not fixed:
        return {"branch": branches(graph), "again": branches(graph, copied), "compiled": True}
    branch = again = compile_graph(graph, f"branch {block.name}")
    if moved:
        again = compile_graph(branch_graph(block, flow, moved), f"branch {block.name}")
    fixed |= branches is not None or any(node.op == "call_module" and GIVEN in node.meta for node in graph.nodes)
    return {"branch": branch, "again": again, "graph": None if fixed else graph, "moved": copied}


def _moved_in(graph: fx.Graph, block: Block, moved: Container[fx.Node]) -> tuple[fx.Node, ...]:
    """What stands in a branch's graph for running statistics that it moves."""
    paths = {str(node.target) for node in block.members if node.op == "get_attr" and node in moved}
    sides = graph.find_nodes(op="placeholder")[2:]
    attributes = [node for node in graph.nodes if node.op == "get_attr" and str(node.target) in paths]
    return (*attributes, *(node for node, side in zip(sides, block.sides, strict=True) if side in moved))


def _running_statistics(block: Block) -> set[fx.Node]:
    """The running statistics that functional normalizations of the branch move."""
    norms = [node for node in block.members if moves_statistics(node)]
    return {source for node in norms for source in running_statistics(node)}


def _is_buffer(root: nn.Module, path: str) -> bool:
    owner, name = split_path(path)
    return name in root.get_submodule(owner)._buffers


def _parameters(
    root: nn.Module, modules: Iterable[str], attributes: Iterable[str]
) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Each parameter that a branch uses, with all the names it goes by there."""
    aliases: dict[int, list[tuple[str, str]]] = {}
    for path in modules:
        for name, parameter in root.get_submodule(path).named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(split_path(f"{path}.{name}"))
    for path in attributes:
        value = get_attribute(root, path)
        if isinstance(value, nn.Parameter) and split_path(path) not in aliases.setdefault(id(value), []):
            aliases[id(value)].append(split_path(path))
    return tuple(tuple(dict.fromkeys(names)) for names in aliases.values())


def branch_graph(block: Block, flow: Dataflow, left_out: Container[fx.Node] = ()) -> fx.Graph:
    """The branch of ``block``: ``branch(root, x, *sides) -> (value, *escapes)``.

    Normalizations are given copies of running statistics that are ``left_out``, since both runs may have to save the
    same; in a chain None for those that are sides.
    """
    graph = fx.Graph()
    graph.placeholder("root")
    env: dict[fx.Node, Any] = {block.skip: graph.placeholder("x")}
    for number, side in enumerate(block.sides):
        env[side] = graph.placeholder(f"side_{number}")
    for source, placeholder in env.items():
        placeholder.meta = {note: source.meta[note] for note in (SHAPE, "example_value") if note in source.meta}
    for side in block.sides:
        # Where buffers are inputs of the graph, they are sides.
        if side in left_out:
            env[side] = graph.call_method("clone", (env[side],)) if block.kind == "segment" else None
    switches = Switches(graph, block.output.meta.get(MODES))
    hidden = () if block.kind == "segment" else [side for side in block.sides if side in left_out]
    for node in block.members:
        switches.before(node)
        if block.tail and node is block.tail[0] and block.written:
            env[node] = _functional(graph, flow.adds[node], env)
        elif node in left_out:
            env[node] = graph.call_method("clone", (graph.node_copy(node),))
        else:
            env[node] = graph.node_copy(node, lambda source: None if source in hidden else env[source])  # type: ignore
    switches.end()
    graph.output(tuple(env[node] for node in (block.value, *block.escapes)))
    graph.lint()
    return graph


def _functional(graph: fx.Graph, form: Add, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """An in-place add as one that leaves x and escapes alone; the result has the dtype it has there."""
    kwargs: dict[str, Any] = {} if form.scale == 1.0 else {"alpha": form.scale}
    total = graph.call_function(torch.add, (env[form.left], env[form.right]), kwargs)
    return graph.call_method("type_as", (total, env[form.left]))


def split_path(path: str) -> tuple[str, str]:
    """Path of the owner, and name."""
    owner, _, name = path.rpartition(".")
    return owner, name


def join_path(owner: str, name: str) -> str:
    """What :func:`split_path` took apart."""
    return f"{owner}.{name}" if owner else name
