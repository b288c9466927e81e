"""Binding: how a rewritten graph comes by the model's parameters, buffers and modules.

:class:`ByRoot`: the graph takes the root module as its first argument, and names what it needs by path.
:class:`Lifted`: parameters and buffers are placeholders, as in the graphs that Dynamo hands over.  There chains take
tensors alone, their branches are compiled, and what the graph's module holds beside (constants, inner graphs) is
closed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from mfx.plan import Chain
from mfx.rewrite.code import chain_function, compile_graph, segment_function
from mfx.rewrite.compiled import Branches
from mfx.rule import StepSpec
from mfx.run import ChainSpec

Added = tuple[Callable[..., Any], tuple[fx.Node, ...]]
"""A function of x_0 and operands that gives v_0 or gammas, and the operands' nodes."""


class Binding(Protocol):
    """What depends on the form of a graph when chains are put into it.

    ``branches`` compile branches, where they are compiled.
    """

    @property
    def branches(self) -> Branches | None: ...

    def begin(self, graph: fx.Graph) -> tuple[fx.Node, ...]:
        """Begin a new graph; gives what every chain takes first."""
        ...

    def function(self, spec: ChainSpec) -> Callable[..., Any]:
        """What calls a chain."""
        ...

    def added(self, kind: str, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        """v_0 or the gammas of a chain to which modules give them (:data:`mfx.graph.notes.ADDED`)."""
        ...

    def keywords(self, chain: Chain) -> dict[str, Any]:
        """What a chain takes by keyword."""
        ...

    def segment(self, spec: StepSpec, index: int) -> Callable[..., Any]:
        """What calls a segment."""
        ...

    def measured(self) -> Binding:
        """The binding by which the bytes of a rewritten graph are measured: by root, with nothing compiled."""
        ...

    def finish(self, graph: fx.Graph) -> Callable[..., Any]:
        """The function that computes the finished graph."""
        ...


@dataclass(frozen=True)
class ByRoot:
    """The binding of captured graphs; the result is ``run(root, *inputs)``."""

    branches = None

    def begin(self, graph: fx.Graph) -> tuple[fx.Node, ...]:
        return (graph.placeholder("root"),)

    def function(self, spec: ChainSpec) -> Callable[..., Any]:
        return chain_function(spec)

    def added(self, kind: str, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        return graph.call_module(f"{kind}.{chain.index}", (x,))

    def keywords(self, chain: Chain) -> dict[str, Any]:
        # For who prints the graph.
        return {"plan": chain.note}

    def segment(self, spec: StepSpec, index: int) -> Callable[..., Any]:
        return segment_function(spec, index)

    def measured(self) -> Binding:
        return self

    def finish(self, graph: fx.Graph) -> Callable[..., Any]:
        return compile_graph(graph, "forward")


@dataclass(frozen=True)
class Lifted:
    """The binding of a compiler's graphs; the result is a module with the placeholders of ``gm``.

    ``branches`` compile branches; ``given`` has an entry for each chain, where modules give velocities or
    gammas; ``now`` is
    asked, whenever a chain runs, what it is to run with.
    """

    gm: fx.GraphModule
    branches: Branches
    given: Mapping[str, Sequence[Added]] = field(default_factory=dict)
    now: Callable[[ChainSpec], ChainSpec] = lambda spec: spec

    def begin(self, graph: fx.Graph) -> tuple[fx.Node, ...]:
        return ()

    def function(self, spec: ChainSpec) -> Callable[..., Any]:
        return chain_function(spec, self.gm, self.now)

    def added(self, kind: str, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        function, operands = self.given[kind][chain.index]
        return graph.call_function(function, (x, *(env[operand] for operand in operands)))

    def keywords(self, chain: Chain) -> dict[str, Any]:
        return {}

    def segment(self, spec: StepSpec, index: int) -> Callable[..., Any]:
        return segment_function(spec, index, self.gm)

    def measured(self) -> Binding:
        return _Measured(self)

    def finish(self, graph: fx.Graph) -> Callable[..., Any]:
        return fx.GraphModule(self.gm, graph)


@dataclass(frozen=True)
class _Measured(ByRoot):
    """The graph of ``lifted``, by root."""

    lifted: Lifted

    def added(self, kind: str, graph: fx.Graph, chain: Chain, x: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
        return self.lifted.added(kind, graph, chain, x, env)
