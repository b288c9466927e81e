"""Bodies: the graphs of higher-order operations (``torch.utils.checkpoint``, ``torch.cond``) inside of an outer graph.

What runs there is run again, or in part, as the operation has it; so chains in a body store, and are compiled with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from mfx.graph.notes import REGION
from mfx.torch_versions import pytree


@dataclass(eq=False)
class Body:
    """The graph ``gm`` that ``outer`` has under a name."""

    outer: fx.GraphModule
    name: str
    gm: fx.GraphModule

    def take(self, gm: fx.GraphModule) -> None:
        """Put another graph in its place."""
        if gm is not self.gm:
            gm.meta.update(self.gm.meta)
            setattr(self.outer, self.name, gm)
            self.gm = gm


def bodies(gm: fx.GraphModule, kinds: Mapping[fx.Node, str]) -> Iterator[tuple[Body, list[str]]]:
    """The bodies in ``gm`` that momentumized models run in, each with the kinds of its inputs.

    ``kinds`` are those of the outer graph's.  What an operation gives to its body are the last of its arguments.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        body = getattr(gm, str(node.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        inputs = body.graph.find_nodes(op="placeholder")
        given = [leaf for user in node.users for leaf in pytree.tree_leaves(user.args)][-len(inputs) :]
        inner = [_kind(value, kinds) for value in given] if inputs else []
        yield from bodies(body, dict(zip(inputs, inner, strict=True)))
        if any(REGION in one.meta for one in body.graph.nodes):
            yield Body(gm, str(node.target), body), inner


def _kind(value: Any, kinds: Mapping[fx.Node, str]) -> str:
    """As :func:`mfx.capture.lifted.kind_of` has it."""
    return kinds.get(value, "") if isinstance(value, fx.Node) else "number"
