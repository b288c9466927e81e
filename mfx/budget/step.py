"""Step: the bytes that a training step of a rewritten graph has alive at most, and where, on fake tensors.

The graph that will run is what runs here, forward and backward, so the figures are those of the code itself.  Outputs
that are scalars are losses; where there is none, the loss is one that makes a gradient of each output, which goes once
used.  The outputs are held until the end.  The gradient of a parameter is set aside as soon as it is there: what
remains is what a step needs beside gradients, and both together what a step needs that makes its gradients anew, as
after ``optimizer.zero_grad()``.  On an accelerator what lies in the memory of the host does not count.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx.budget.live import LiveBytes
from mfx.graph.notes import SCOPE
from mfx.graph.shapes import Fake, Interpreter
from mfx.rewrite.switches import all_left
from mfx.torch_versions import current_node, pytree


@dataclass(frozen=True)
class Course:
    """The bytes alive after each operation of a step, of which the first ``forward`` are those of the forward."""

    bytes: tuple[int, ...]
    forward: int


@dataclass(frozen=True)
class Peak:
    """Bytes alive ``after_forward`` and at most; ``where`` what stood there.

    ``with_gradients`` is the most with the gradients that the step has made by then, ``left`` what is alive after
    backward beside these: the outputs; ``course`` is how it came about.
    """

    after_forward: int
    bytes: int
    where: str
    with_gradients: int = 0
    left: int = 0
    course: Course | None = None


def peak_of(graph: fx.Graph, root: nn.Module, inputs: Sequence[Any], rewritten: bool = False) -> Peak:
    """The peak of a step of ``graph``, by root, for ``inputs``; one that is ``rewritten`` takes the root first."""
    fake = Fake(root, list(inputs))
    with fake(), torch.enable_grad():
        run = _Where(graph, root)
        if rewritten:
            run.base = None  # it switches modes by nodes of its own
        with all_left(), LiveBytes(run.where, host=not is_on_accelerator(root, inputs)) as live:
            for parameter in root.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(functools.partial(_set_aside, live))
            output = run.run(*([root] if rewritten else []), *fake.tensors)
            forward, operations = live.now, len(live.course)
            run.at = None
            ends = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            losses = [end for end in ends if end.dim() == 0] or [(end * 1).sum() for end in ends]
            if losses:
                torch.autograd.backward(losses)
            left = live.now
        del output, ends
    course = Course(tuple(live.course), operations)
    return Peak(forward, live.peak, live.where, live.peak_with_aside, left, course)


def _set_aside(live: LiveBytes, leaf: Tensor) -> None:
    """Set the gradient of a leaf aside; an operation that has none to give runs this as well."""
    if leaf.grad is not None:
        live.set_aside(leaf.grad)


def is_on_accelerator(root: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether a step has memory of its own beside that of the host (a model on ``meta`` is for one that has)."""
    own = [*root.parameters(), *root.buffers()]
    given = [value for value in inputs if isinstance(value, Tensor) and not value.is_meta]  # which go where it is
    return any(tensor.device.type != "cpu" for tensor in own or given)


class _Where(Interpreter):
    """Marks the autograd nodes of each value with the node of the graph that made it."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        super().__init__(graph, root)
        self.backward: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                leaf.grad_fn.metadata.setdefault("mfx", n)  # type: ignore[union-attr]
        return value

    def where(self) -> str:
        """The module, or the name, of what runs now."""
        if self.at is not None:
            return f"in {_name(self.at)}"
        backward = current_node()
        # What is recomputed has a graph of its own, without marks: it belongs to what was marked last.
        self.backward = (backward and backward.metadata.get("mfx")) or self.backward  # type: ignore[union-attr]
        return "in the backward" if self.backward is None else f"in the backward of {_name(self.backward)}"


def _name(node: fx.Node) -> str:
    scope = node.meta.get(SCOPE)
    return (scope and scope.path) or node.name
