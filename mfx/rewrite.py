"""Rewrite: a graph and a plan to a new graph in which each chain is one momentum node.

1. Chains take the place of their blocks' nodes; the order is a topological one that keeps the original's
   wherever it can.
2. A chain node's arguments are the root module, x_0, v_0 (or None), and for each block a tuple of operands:
   its side values, then its parameters.  Its results are x_N, the taps, and the branch values handed out.
3. Each branch becomes a graph, and a function, of its own: ``branch(root, x, *sides)``.

Both kinds of graph take the root module as their first argument and name parameters, buffers and modules by
path; they own nothing (M4).  This is the only module that builds graphs.
"""

from __future__ import annotations

import copy
import linecache
import operator
import types
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from mfx import operations
from mfx.block import Block
from mfx.capture import ADDED
from mfx.counter import draw_seed
from mfx.dataflow import Dataflow, get_attribute
from mfx.find import Found
from mfx.momentum import ChainSpec, Escape, State, StepSpec
from mfx.operations import Add
from mfx.options import Options
from mfx.plan import Chain, Plan, contract, first_states
from mfx.reversible import run

_serial = count()
Velocity = tuple[Callable[..., Any], tuple[fx.Node, ...]]
"""A function of x_0 and operands that gives v_0, and the operands' nodes."""


@dataclass(frozen=True, eq=False)
class Rewritten:
    """The new graph, and the function ``run(root, *tensors)`` that computes it."""

    graph: fx.Graph
    run: Callable[..., Any]
    chains: tuple[ChainSpec, ...]

    @property
    def code(self) -> str:
        """The graph as Python."""
        return self.graph.python_code("self").src


def rewrite(found: Found, plan: Plan) -> Rewritten:
    """The graph of ``found`` with the chains of ``plan`` as momentum nodes."""
    graph = fx.Graph()
    root = graph.placeholder("root")
    specs = _fill(graph, found.flow, plan, lambda spec: (_named(spec), (root,)))
    return Rewritten(graph, compile_graph(graph, "forward"), specs)


def with_gammas(rewritten: Rewritten, plan: Plan) -> Rewritten:
    """``rewritten`` with the gammas and schedules of a plan of the same chains; branches stay as they are."""
    specs = []
    for spec, chain in zip(rewritten.chains, plan.chains, strict=True):
        steps = tuple(replace(step, gamma=gamma) for step, gamma in zip(spec.steps, chain.gammas, strict=True))
        specs.append(replace(spec, steps=steps, schedule=chain.schedule))
    graph = copy.deepcopy(rewritten.graph)
    calls = {spec.name: _named(spec) for spec in specs}
    notes = {spec.name: chain.note for spec, chain in zip(specs, plan.chains, strict=True)}
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if getattr(node.target, "__module__", "") == "mfx" and name in calls:
            node.target, node.kwargs = calls[name], {**node.kwargs, "plan": notes[name]}
    return Rewritten(graph, _with_calls(rewritten.run, calls), tuple(specs))


def rewrite_lifted(
    found: Found, plan: Plan, gm: fx.GraphModule, stored: Container[int] = (), velocities: Sequence[Velocity] = ()
) -> fx.GraphModule:
    """The same for a graph whose parameters and buffers are placeholders: a module with ``gm``'s placeholders.

    Chains take tensors alone, so compilers can trace them; what ``gm`` holds beside (constants, inner graphs) is
    closed over.  Chains that draw random numbers take a seed.

    Args:
        found, plan: of ``gm``'s graph.
        gm: the graph's module.
        stored: indices of the chains that keep their activations.
        velocities: one for each chain, where they are learned.
    """
    graph = fx.Graph()

    def target(spec: ChainSpec) -> tuple[Callable[..., Any], tuple[fx.Node, ...]]:
        return _named(replace(spec, reversible=False) if spec.index in stored else spec, gm), ()

    _fill(graph, found.flow, plan, target, _Lifted(stored, velocities))
    return fx.GraphModule(gm, graph)


@dataclass(frozen=True)
class _Lifted:
    """What chains of a lifted graph take beside their operands."""

    stored: Container[int]
    velocities: Sequence[Velocity]

    def seed(self, graph: fx.Graph, spec: ChainSpec, x: fx.Node) -> dict[str, fx.Node]:
        """The seed, where some step draws; each forward draws one."""
        draws = spec.reversible and spec.index not in self.stored and any(step.draws for step in spec.steps)
        return {"seed": graph.call_function(draw_seed, (x,))} if draws else {}

    def velocity(self, graph: fx.Graph, index: int, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        """v_0 of a chain with a learned velocity."""
        function, operands = self.velocities[index]
        return graph.call_function(function, (x, *(env[operand] for operand in operands)))


def _fill(
    graph: fx.Graph,
    flow: Dataflow,
    plan: Plan,
    target: Callable[[ChainSpec], tuple[Callable[..., Any], tuple[fx.Node, ...]]],
    lifted: _Lifted | None = None,
) -> tuple[ChainSpec, ...]:
    """Put the rewritten nodes into ``graph``; ``target`` gives what calls a chain, and its first arguments."""
    specs = tuple(_build(chain, plan.options, flow) for chain in plan.chains)
    env: dict[fx.Node, fx.Node] = {}
    first = first_states([chain.blocks for chain in plan.chains])
    for item in _order(flow, plan):
        if isinstance(item, Chain):
            _emit(graph, target(specs[item.index]), item, specs[item.index], plan.options, env, lifted)
        else:
            env[item] = graph.node_copy(item, _lookup(item, env, first))
    graph.lint()
    return specs


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function of a graph whose first placeholder is the root module.

    The root is given twice: as ``self`` for the modules named by path, and as the value that chains take.
    """
    code = graph.python_code("self")
    filename = f"<mfx {name} {next(_serial)}>"
    scope = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    return _root_twice(scope["forward"])


def _root_twice(function: Any) -> Callable[..., Any]:
    def call(root: nn.Module, *inputs: Any) -> Any:
        return function(root, root, *inputs)

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def _with_calls(compiled: Any, calls: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A compiled graph with other chain functions, by their names; nothing is compiled anew."""
    function = compiled.__wrapped__
    scope = dict(function.__globals__)
    for key, value in scope.items():
        if getattr(value, "__module__", None) == "mfx" and getattr(value, "__name__", None) in calls:
            scope[key] = calls[value.__name__]
    return _root_twice(types.FunctionType(function.__code__, scope, function.__name__))


def _lookup(
    reader: fx.Node, env: dict[fx.Node, fx.Node], first: dict[fx.Node, fx.Node]
) -> Callable[[fx.Node], fx.Node]:
    """Where a node outside the chains finds its inputs; what all states share is asked of x_0."""
    if not operations.is_shape_query(reader):
        return env.__getitem__
    return lambda node: env[first[node]] if node in first and node not in env else env[node]


def _order(flow: Dataflow, plan: Plan) -> list[fx.Node | Chain]:
    """Chains and remaining nodes in an order that respects all inputs, and the original where it can."""
    contracted = contract(flow, [chain.blocks for chain in plan.chains])

    def place(item: fx.Node | int) -> int:
        return flow.position[plan.chains[item].output if isinstance(item, int) else item]

    ordered = nx.lexicographical_topological_sort(contracted, place)
    return [plan.chains[item] if isinstance(item, int) else item for item in ordered]


def _emit(
    graph: fx.Graph,
    target: tuple[Callable[..., Any], tuple[fx.Node, ...]],
    chain: Chain,
    spec: ChainSpec,
    options: Options,
    env: dict[fx.Node, fx.Node],
    lifted: _Lifted | None,
) -> None:
    """Add the momentum node of ``chain``, and name its results in ``env``."""
    x = env[chain.input]
    velocity = None
    if callable(options.velocity) and lifted is not None:
        velocity = lifted.velocity(graph, chain.index, x, env)
    elif callable(options.velocity):
        velocity = graph.call_module(f"{ADDED}.{chain.index}", (x,))
    groups = []
    for block, step in zip(chain.blocks, spec.steps, strict=True):
        outer = [env[side] for side, inner in zip(block.sides, step.sides, strict=True) if inner is None]
        parameters = [graph.get_attr(_join(*aliases[0])) for aliases in step.parameters]
        groups.append((*outer, *parameters))
    function, first = target
    given: dict[str, Any] = {"plan": chain.note} if lifted is None else lifted.seed(graph, spec, x)
    node = graph.call_function(function, (*first, x, velocity, *groups), given)
    for position, value in enumerate((chain.output, *chain.taps, *chain.escapes)):
        env[value] = graph.call_function(operator.getitem, (node, position))


def _named(spec: ChainSpec, bound: nn.Module | None = None) -> Callable[..., Any]:
    """The chain as a function of its own name, which is what a graph prints; so is ``plan``, which is for readers."""

    def momentum(root: nn.Module, x: Any, velocity: Any, *operands: Any, plan: str = "") -> Any:
        return run(spec, root, x, velocity, *operands)

    def momentum_of_tensors(x: Any, velocity: Any, *operands: Any, seed: Any = None) -> Any:
        assert bound is not None
        return run(spec, bound, x, velocity, *operands, seed=seed)

    function = momentum if bound is None else momentum_of_tensors
    function.__name__ = function.__qualname__ = spec.name
    function.__module__ = "mfx"
    return function


def _build(chain: Chain, options: Options, flow: Dataflow) -> ChainSpec:
    inside = {node for block in chain.blocks for node in block.nodes}
    values: dict[fx.Node, State | Escape] = {}
    steps = []
    for index, (block, gamma) in enumerate(zip(chain.blocks, chain.gammas, strict=True)):
        steps.append(_step(block, gamma, values, flow))
        values[block.output] = State(index)
        values.update({node: Escape(index, number) for number, node in enumerate(block.escapes)})
    handed = (chain.output, *chain.taps, *chain.escapes)
    taps = [values[tap] for tap in chain.taps]
    return ChainSpec(
        name=f"momentum_{chain.index}",
        index=chain.index,
        steps=tuple(steps),
        schedule=chain.schedule,
        taps=tuple(tap.step for tap in taps),
        copied=frozenset(i for i, value in enumerate(handed) if _overwritten(value, inside, flow)),
        reversible=options.reversible,
    )


def _overwritten(value: fx.Node, inside: set[fx.Node], flow: Dataflow) -> bool:
    """Whether code outside the chain writes to a value that is handed out."""
    return any(writer not in inside for writer in flow.writers.get(flow.memory[value], ()))


def _step(block: Block, gamma: float, values: dict[fx.Node, State | Escape], flow: Dataflow) -> StepSpec:
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
        gamma=gamma,
        wrapped=block.kind == "wrapped",
        scale=block.scale,
        written=block.written,
        sides=tuple(values.get(side) for side in block.sides),
        parameters=_parameters(flow.root, modules, attributes),
        modules=tuple(modules),
        buffers=tuple(dict.fromkeys(_split(path) for path in buffers)),
        statistics=frozenset(number for number, side in enumerate(block.sides) if side in moved),
        draws=any(_may_draw(node, flow.root) for node in block.members),
        sees_grad_mode=any(operations.sees_grad_mode(node, flow.root) for node in block.members),
        branch_first=block.branch_first,
    )


def _may_draw(node: fx.Node, root: nn.Module) -> bool:
    return operations.is_random(node, root) and not operations.draws_nothing(node)


def _running_statistics(block: Block) -> set[fx.Node]:
    """The running statistics that functional normalizations of the branch move."""
    norms = [node for node in block.members if operations.moves_statistics(node)]
    return {source for node in norms for source in _statistics_of(node).values() if isinstance(source, fx.Node)}


def _statistics_of(node: fx.Node) -> dict[str, Any]:
    return {
        "running_mean": operations.argument(node, 1, "running_mean"),
        "running_var": operations.argument(node, 2, "running_var"),
    }


def _is_buffer(root: nn.Module, path: str) -> bool:
    owner, name = _split(path)
    return name in root.get_submodule(owner)._buffers


def _parameters(
    root: nn.Module, modules: Iterable[str], attributes: Iterable[str]
) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Each parameter that a branch uses, with all the names it goes by there."""
    aliases: dict[int, list[tuple[str, str]]] = {}
    for path in modules:
        for name, parameter in root.get_submodule(path).named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(_split(f"{path}.{name}"))
    for path in attributes:
        value = get_attribute(root, path)
        if isinstance(value, nn.Parameter) and _split(path) not in aliases.setdefault(id(value), []):
            aliases[id(value)].append(_split(path))
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
    for node in block.members:
        if block.tail and node is block.tail[0] and block.written:
            env[node] = _functional(graph, flow.adds[node], env)
        elif node not in left_out:
            env[node] = graph.node_copy(node, lambda source: None if source in left_out else env[source])  # type: ignore
    graph.output(tuple(env[node] for node in (block.value, *block.escapes)))
    graph.lint()
    return graph


def _functional(graph: fx.Graph, form: Add, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """An in-place add as one that leaves x and escapes alone; the result has the dtype it has there."""
    kwargs: dict[str, Any] = {} if form.scale == 1.0 else {"alpha": form.scale}
    total = graph.call_function(torch.add, (env[form.left], env[form.right]), kwargs)
    return graph.call_method("type_as", (total, env[form.left]))


def _split(path: str) -> tuple[str, str]:
    owner, _, name = path.rpartition(".")
    return owner, name


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name
