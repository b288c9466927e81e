"""Traced: a segment as a compiler sees it.

1. It is traced once, and marked as torch's own checkpoint is: the compiler's partitioner runs it again in backward.
2. Random values come from a seed, so they are the same in both runs (M6).
3. In code that runs without being traced (the backend "eager"), it is a segment as any other
   (:mod:`mfx.run.uninverted.segment`).

Source: torch/_higher_order_ops/wrap.py (``tag_activation_checkpoint``), as Dynamo has it for torch.utils.checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx.rule import StepSpec
from mfx.run import recomputed
from mfx.run.conditions import is_symbolic
from mfx.run.seeded import Seed, counted, draw_seed
from mfx.torch_versions import functions_are_transformed, tag_activation_checkpoint


def drawn(*inputs: Any) -> Tensor | None:
    """A seed for a segment of such inputs."""
    return next((draw_seed(value) for value in inputs if isinstance(value, Tensor)), None)


def traced(spec: StepSpec, root: nn.Module, number: int, *inputs: Any, seed: Tensor | None = None) -> tuple[Any, ...]:
    """The same for segment ``number`` whose parameters are among its ``inputs``; a compiler may trace it."""
    if not any(is_symbolic(value) for value in inputs if isinstance(value, Tensor)):
        return recomputed(spec, root, *inputs)

    def branch(drawn: Tensor | None, *values: Any) -> tuple[Any, ...]:
        with counted(None if drawn is None else Seed(drawn, start=2 + number), 0, spec.name):
            return spec.branch(root, *values)

    run = branch if functions_are_transformed() or not torch.is_grad_enabled() else _marked(branch, len(inputs))
    return run(seed, *inputs)


def _marked(branch: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``branch`` of a seed and ``count`` inputs, marked."""
    graph = fx.Graph()
    given = [graph.placeholder(f"input_{number}") for number in range(1 + count)]
    graph.output(graph.call_function(branch, tuple(given)))
    return functools.partial(tag_activation_checkpoint, fx.GraphModule(nn.Module(), graph), use_reentrant=False)
