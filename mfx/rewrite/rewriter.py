"""Rewrite: a graph and a plan to a new graph in which each chain is one momentum node.

1. Chains take the place of their blocks' nodes; the order is a topological one that keeps the original's
   wherever it can.
2. A chain node's arguments are what its :mod:`mfx.rewrite.binding` gives first, x_0, v_0 (or None), and for each block
   a tuple of operands: its side values, then its parameters.  Its results are x_N, the taps, and the branch values
   handed out.
3. Each branch becomes a graph, and a function, of its own (:mod:`mfx.rewrite.specs`).
4. Nodes run under the modes that they carry, a chain under those of its adds (:mod:`mfx.rewrite.switches`).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mfx.find import Block, Found
from mfx.graph import operations
from mfx.graph.notes import GAMMA, MODES, VELOCITY
from mfx.plan import Chain, Plan
from mfx.plan.order import first_states, in_order, with_segments
from mfx.rewrite.binding import Binding
from mfx.rewrite.code import chain_function, with_calls
from mfx.rewrite.specs import join_path, segment_spec, spec_of
from mfx.rewrite.switches import Switches
from mfx.rule import StepSpec
from mfx.run import ChainSpec


@dataclass(frozen=True, eq=False)
class Rewritten:
    """The new graph, and the function that computes it (by root: ``run(root, *inputs)``)."""

    graph: fx.Graph
    run: Callable[..., Any]
    chains: tuple[ChainSpec, ...]

    @property
    def code(self) -> str:
        """The graph as Python."""
        return self.graph.python_code("self").src


def rewrite(found: Found, plan: Plan, binding: Binding) -> Rewritten:
    """The graph of ``found`` with the chains of ``plan`` as momentum nodes; the original is left as it is."""
    flow = found.flow
    specs = tuple(spec_of(chain, flow, binding.branches) for chain in plan.chains)
    graph = fx.Graph()
    first = binding.begin(graph)
    env: dict[fx.Node, fx.Node] = {}
    runs = [chain.blocks for chain in plan.momentum]
    states = first_states(runs)
    switches = Switches(graph, flow.graph.output_node().meta.get(MODES))
    for item in with_segments(in_order(flow, runs), plan.segments):
        if isinstance(item, int):
            chain = plan.momentum[item]
            switches.to(chain.modes)
            added = [VELOCITY] * callable(plan.options.velocity) + [GAMMA] * callable(plan.options.gamma)
            _emit(graph, binding, first, chain, specs[chain.index], env, added)
        elif isinstance(item, Block):
            switches.to(item.output.meta.get(MODES))
            index = plan.segments.index(item)
            away = index if index < plan.offloaded else None
            spec = segment_spec(item, flow, away, binding.branches)
            _emit_segment(graph, binding, first, item, spec, index, env)
        elif not (switches.noted and operations.is_ambient(item)):
            switches.before(item)
            env[item] = graph.node_copy(item, _lookup(item, env, states))
    graph.lint()
    return Rewritten(graph, binding.finish(graph), specs)


def chains_with_rules(chains: Sequence[ChainSpec], plan: Plan) -> tuple[ChainSpec, ...]:
    """``chains`` with the rules of a plan of the same chains; branches stay as they are."""
    specs = []
    for spec, chain in zip(chains, plan.chains, strict=True):
        steps = tuple(replace(step, rule=rule) for step, rule in zip(spec.steps, chain.rules, strict=True))
        specs.append(replace(spec, steps=steps, schedule=chain.schedule))
    return tuple(specs)


def with_rules(rewritten: Rewritten, plan: Plan) -> Rewritten:
    """``rewritten``, a graph by root, with the rules of a plan of the same chains."""
    specs = chains_with_rules(rewritten.chains, plan)
    graph = copy.deepcopy(rewritten.graph)
    calls = {spec.name: chain_function(spec) for spec in specs}
    notes = {spec.name: chain.note for spec, chain in zip(specs, plan.chains, strict=True)}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if getattr(node.target, "__module__", "") == "mfx" and name in calls:
            node.target, node.kwargs = calls[name], {**node.kwargs, "plan": notes[name]}
    return Rewritten(graph, with_calls(rewritten.run, calls), specs)


def _lookup(
    reader: fx.Node, env: dict[fx.Node, fx.Node], first: dict[fx.Node, fx.Node]
) -> Callable[[fx.Node], fx.Node]:
    """Where a node outside the chains finds its inputs; what all states share is asked of x_0."""
    if not operations.is_shape_query(reader):
        return env.__getitem__
    return lambda node: env[first[node]] if node in first and node not in env else env[node]


def _emit(
    graph: fx.Graph,
    binding: Binding,
    first: tuple[fx.Node, ...],
    chain: Chain,
    spec: ChainSpec,
    env: dict[fx.Node, fx.Node],
    added: Collection[str],
) -> None:
    """Add the momentum node of ``chain``, and name its results in ``env``; ``added`` is what modules give to it."""
    x = env[chain.input]
    given = {kind: binding.added(kind, graph, chain, x, env) for kind in added}
    groups = []
    for block, step in zip(chain.blocks, spec.steps, strict=True):
        outer = [env[side] for side, inner in zip(block.sides, step.sides, strict=True) if inner is None]
        parameters = [graph.get_attr(join_path(*aliases[0])) for aliases in step.parameters]
        groups.append((*outer, *parameters))
    keywords = binding.keywords(chain) | ({"gammas": given[GAMMA]} if GAMMA in given else {})
    node = graph.call_function(binding.function(spec), (*first, x, given.get(VELOCITY), *groups), keywords)
    for position, value in enumerate((chain.output, *chain.taps, *chain.escapes)):
        env[value] = graph.call_function(operator.getitem, (node, position))
        if _without_gradient(value, chain):
            env[value] = graph.call_method("detach", (env[value],))


def _emit_segment(
    graph: fx.Graph,
    binding: Binding,
    first: tuple[fx.Node, ...],
    segment: Block,
    spec: StepSpec,
    index: int,
    env: dict[fx.Node, fx.Node],
) -> None:
    """Add the node of ``segment``, and name its results in ``env``."""
    inputs = [env[source] for source in (segment.skip, *segment.sides)]
    node = graph.call_function(binding.segment(spec, index), (*first, *inputs))
    for position, value in enumerate((segment.value, *segment.escapes)):
        env[value] = graph.call_function(operator.getitem, (node, position))


def _without_gradient(value: fx.Node, chain: Chain) -> bool:
    """Whether a branch computes the value without gradient: in a step all values have one, if only of zero."""
    modes = value.meta.get(MODES)
    return value in chain.escapes and modes is not None and chain.modes is not None and chain.modes.grad > modes.grad
