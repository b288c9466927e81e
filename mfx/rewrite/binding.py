"""Binding: how a rewritten graph comes by the model's parameters, buffers and modules.

:class:`ByRoot`: the graph takes the root module as its first argument, and names what it needs by path.
:class:`Lifted`: parameters and buffers are placeholders, as in the graphs that Dynamo hands over.  There chains take
tensors alone, so that compilers can trace them, and what the graph's module holds beside (constants, inner graphs) is
closed over.  Chains that draw random numbers take a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import ADDED
from mfx.plan import Chain, Way
from mfx.rewrite.code import chain_function, compile_graph, segment_function
from mfx.rewrite.traced import drawn
from mfx.rule import StepSpec
from mfx.run import ChainSpec
from mfx.run.seeded import draw_seed

Velocity = tuple[Callable[..., Any], tuple[fx.Node, ...]]
"""A function of x_0 and operands that gives v_0, and the operands' nodes."""


class Binding(Protocol):
    """What depends on the form of a graph when chains are put into it."""

    def begin(self, graph: fx.Graph) -> tuple[fx.Node, ...]:
        """Begin a new graph; gives what every chain takes first."""
        ...

    def way(self, chain: Chain) -> Way:
        """How a chain runs there."""
        ...

    def function(self, spec: ChainSpec) -> Callable[..., Any]:
        """What calls a chain."""
        ...

    def velocity(self, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        """v_0 of a chain with a learned velocity."""
        ...

    def keywords(self, graph: fx.Graph, chain: Chain, spec: ChainSpec, x: fx.Node) -> dict[str, Any]:
        """What a chain takes by keyword."""
        ...

    @property
    def offloads(self) -> bool:
        """Whether what a segment needs may wait on the host."""
        ...

    def segment(self, spec: StepSpec, index: int) -> Callable[..., Any]:
        """What calls a segment."""
        ...

    def draw(self, graph: fx.Graph, spec: StepSpec, inputs: Sequence[fx.Node]) -> dict[str, Any]:
        """What a segment takes by keyword."""
        ...

    def repeats(self, flow: Dataflow, node: fx.Node) -> bool:
        """Whether a segment may run the node again."""
        ...

    def measured(self) -> Binding:
        """The binding by which the bytes of a rewritten graph are measured: by root, and run in the same way."""
        ...

    def finish(self, graph: fx.Graph) -> Callable[..., Any]:
        """The function that computes the finished graph."""
        ...


@dataclass(frozen=True)
class ByRoot:
    """The binding of captured graphs; the result is ``run(root, *inputs)``."""

    def begin(self, graph: fx.Graph) -> tuple[fx.Node, ...]:
        return (graph.placeholder("root"),)

    def way(self, chain: Chain) -> Way:
        return chain.eager

    def function(self, spec: ChainSpec) -> Callable[..., Any]:
        return chain_function(spec)

    def velocity(self, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        return graph.call_module(f"{ADDED}.{chain.index}", (x,))

    def keywords(self, graph: fx.Graph, chain: Chain, spec: ChainSpec, x: fx.Node) -> dict[str, Any]:
        # For who prints the graph.
        return {"plan": chain.note}

    @property
    def offloads(self) -> bool:
        return True

    def segment(self, spec: StepSpec, index: int) -> Callable[..., Any]:
        return segment_function(spec, index)

    def draw(self, graph: fx.Graph, spec: StepSpec, inputs: Sequence[fx.Node]) -> dict[str, Any]:
        return {}

    def repeats(self, flow: Dataflow, node: fx.Node) -> bool:
        return True

    def measured(self) -> Binding:
        return self

    def finish(self, graph: fx.Graph) -> Callable[..., Any]:
        return compile_graph(graph, "forward")


@dataclass(frozen=True)
class Lifted:
    """The binding of a compiler's graphs; the result is a module with the placeholders of ``gm``.

    ``velocities`` has one entry for each chain, where they are learned.
    """

    gm: fx.GraphModule
    velocities: Sequence[Velocity] = field(default=())

    def begin(self, graph: fx.Graph) -> tuple[fx.Node, ...]:
        return ()

    def way(self, chain: Chain) -> Way:
        # What a budget keeps is kept here as well.
        return chain.compiled if chain.eager.reversible else chain.eager

    def function(self, spec: ChainSpec) -> Callable[..., Any]:
        return chain_function(spec, self.gm)

    def velocity(self, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        function, operands = self.velocities[chain.index]
        return graph.call_function(function, (x, *(env[operand] for operand in operands)))

    def keywords(self, graph: fx.Graph, chain: Chain, spec: ChainSpec, x: fx.Node) -> dict[str, Any]:
        draws = spec.reversible and any(step.draws for step in spec.steps)
        return {"seed": graph.call_function(draw_seed, (x,))} if draws else {}

    @property
    def offloads(self) -> bool:
        return False

    def segment(self, spec: StepSpec, index: int) -> Callable[..., Any]:
        return segment_function(spec, index, self.gm)

    def draw(self, graph: fx.Graph, spec: StepSpec, inputs: Sequence[fx.Node]) -> dict[str, Any]:
        return {"seed": graph.call_function(drawn, tuple(inputs))} if spec.draws else {}

    def repeats(self, flow: Dataflow, node: fx.Node) -> bool:
        return flow.is_repeatable(node)

    def measured(self) -> Binding:
        return _Measured(self)

    def finish(self, graph: fx.Graph) -> Callable[..., Any]:
        return fx.GraphModule(self.gm, graph)


@dataclass(frozen=True)
class _Measured(ByRoot):
    """The graph of ``lifted``, by root: run eagerly, in the way that it will run compiled."""

    lifted: Lifted

    def way(self, chain: Chain) -> Way:
        return self.lifted.way(chain)

    def velocity(self, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        return self.lifted.velocity(graph, chain, x, env)

    @property
    def offloads(self) -> bool:
        return self.lifted.offloads

    def repeats(self, flow: Dataflow, node: fx.Node) -> bool:
        return self.lifted.repeats(flow, node)
