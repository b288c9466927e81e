"""Specs: from the chains of a plan to what running them needs, each branch a graph and a function of its own.

``branch(root, x, *sides)`` takes the root module first and names parameters, buffers and modules by path; it owns
nothing (M4).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx, nn

from mfx.find import Block
from mfx.graph.adds import Add
from mfx.graph.dataflow import Dataflow, get_attribute
from mfx.graph.notes import MODES
from mfx.graph.operations import argument
from mfx.graph.writes import moves_statistics
from mfx.plan import Chain, Way
from mfx.rewrite.code import compile_graph
from mfx.rewrite.switches import Switches
from mfx.rule import Rule, StepSpec
from mfx.rule.step import Escape, State
from mfx.run import ChainSpec


def spec_of(chain: Chain, flow: Dataflow, way: Way) -> ChainSpec:
    """What running ``chain`` needs, where it runs in this ``way``."""
    inside = {node for block in chain.blocks for node in block.nodes}
    values: dict[fx.Node, State | Escape] = {}
    steps = []
    for index, (block, rule) in enumerate(zip(chain.blocks, chain.rules, strict=True)):
        steps.append(_step(block, rule, values, flow))
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
        copied=frozenset(i for i, value in enumerate(handed) if _overwritten(value, inside, flow)),
        reversible=way.reversible,
    )


def _overwritten(value: fx.Node, inside: set[fx.Node], flow: Dataflow) -> bool:
    """Whether code outside the chain writes to a value that is handed out."""
    return any(writer not in inside for writer in flow.writers.get(flow.memory[value], ()))


def _step(block: Block, rule: Rule, values: dict[fx.Node, State | Escape], flow: Dataflow) -> StepSpec:
    modules = dict.fromkeys(str(node.target) for node in block.members if node.op == "call_module")
    attributes = [str(node.target) for node in block.members if node.op == "get_attr"]
    moved = _running_statistics(block)
    read = [str(node.target) for node in block.members if node.op == "get_attr" and node not in moved]
    buffers = [path for path in read if _is_buffer(flow.root, path)]
    branch = compile_graph(branch_graph(block, flow), f"branch {block.name}")
    return StepSpec(
        name=block.name,
        branch=branch,
        again=compile_graph(branch_graph(block, flow, moved), f"branch {block.name}") if moved else branch,
        rule=rule,
        wrapped=block.kind == "wrapped",
        scale=block.scale,
        written=block.written,
        sides=tuple(values.get(side) for side in block.sides),
        parameters=_parameters(flow.root, modules, attributes),
        modules=tuple(modules),
        buffers=tuple(dict.fromkeys(split_path(path) for path in buffers)),
        statistics=frozenset(number for number, side in enumerate(block.sides) if side in moved),
        draws=any(flow.may_draw(node) for node in block.members),
        sees_grad_mode=any(flow.sees_grad_mode(node) for node in block.members),
        branch_first=block.branch_first,
    )


def _running_statistics(block: Block) -> set[fx.Node]:
    """The running statistics that functional normalizations of the branch move."""
    norms = [node for node in block.members if moves_statistics(node)]
    return {source for node in norms for source in _statistics_of(node).values() if isinstance(source, fx.Node)}


def _statistics_of(node: fx.Node) -> dict[str, Any]:
    return {
        "running_mean": argument(node, 1, "running_mean"),
        "running_var": argument(node, 2, "running_var"),
    }


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

    Normalizations are given None for running statistics that are ``left_out``.
    """
    graph = fx.Graph()
    graph.placeholder("root")
    env = {block.skip: graph.placeholder("x")}
    for number, side in enumerate(block.sides):
        env[side] = graph.placeholder(f"side_{number}")
    switches = Switches(graph, block.output.meta.get(MODES))
    for node in block.members:
        switches.before(node)
        if block.tail and node is block.tail[0] and block.written:
            env[node] = _functional(graph, flow.adds[node], env)
        elif node not in left_out:
            env[node] = graph.node_copy(node, lambda source: None if source in left_out else env[source])  # type: ignore
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
