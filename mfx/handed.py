"""Graphs that Dynamo hands to a backend: what their inputs are, where their nodes ran, whether they are whole.

1. :func:`prepare` tells parameters and buffers among a graph's placeholders, gives each node the module path in
   whose forward it ran, relative to the model, and notes shapes, so that planning sees what it sees in a capture.
2. :func:`refuse_parts` raises where the graph is only a part of what was compiled: a chain cut in two would start
   with a new velocity, and the model would compute another function.

Source: torch/_dynamo/output_graph.py and torch/_dynamo/eval_frame.py, alike in torch 2.11 and 2.15.
Known limits: modules that neither the compiled function's arguments nor its globals hold directly are named by
Dynamo's own expression for them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from mfx.dataflow import DTYPE, SHAPE
from mfx.errors import CompileError
from mfx.lifted import mark
from mfx.versions import source_name

_TORCH = os.path.dirname(torch.__file__)
_BASE = re.compile(r"^([LG])\['([^']+)'\]")


def prepare(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Note on the nodes of ``gm``, as Dynamo hands it over, what planning needs."""
    kinds = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        kind = kind_of(node, value)
        if kind:
            kinds[node] = kind
    mark(gm.graph, kinds, module_paths(gm.graph))
    for node in gm.graph.nodes:
        note_shape(node)


def kind_of(node: fx.Node, value: Any) -> str:
    """Whether a placeholder is a ``"parameter"``, a ``"buffer"``, a ``"number"``, or (empty) an input."""
    if isinstance(value, nn.Parameter):
        return "parameter"
    # Dynamo hands floats that may change as tensors, with an item() in the graph.
    argument = node.meta.get("grapharg")
    if not isinstance(value, torch.Tensor) or getattr(argument, "pass_arg_as_tensor", False):
        return "number"
    source = getattr(node, "_dynamo_source", None)
    return "buffer" if source is not None and "._buffers[" in source_name(source) else ""


def note_shape(node: fx.Node) -> None:
    """Note shape and dtype of a node's value where Dynamo knows them."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return
    node.meta[SHAPE] = tuple(_size(size) for size in value.shape)
    node.meta[DTYPE] = value.dtype
    if node.op == "call_method" and node.target in ("to", "type_as", "float", "double", "half", "bfloat16"):
        source = node.all_input_nodes[0].meta.get("example_value")
        node.meta["dtype_kept"] = isinstance(source, torch.Tensor) and source.dtype == value.dtype


def _size(size: Any) -> Any:
    """A size as it is in the traced call: to compare symbolic ones would add guards."""
    if isinstance(size, int):
        return size
    hint = getattr(size.node, "hint", None)
    return str(size) if hint is None else int(hint)


def module_paths(graph: fx.Graph) -> dict[int, str]:
    """The path of each module that some node ran in, by its id; relative to the model where there is one."""
    named: dict[int, str] = {}
    for node in graph.nodes:
        for key, (expression, _) in (node.meta.get("nn_module_stack") or {}).items():
            identity = key.partition("@")[0]
            if identity.isdigit():
                named.setdefault(int(identity), expression)
    scopes = _scopes()
    bases = {match.group(0): match.groups() for match in map(_BASE.match, named.values()) if match is not None}
    roots = {base: scopes.get(scope, {}).get(name) for base, (scope, name) in bases.items()}
    paths: dict[int, str] = {}
    for identity, expression in named.items():
        match = _BASE.match(expression)
        base = match.group(0) if match is not None else ""
        path = expression[len(base) :].lstrip(".")
        paths[identity] = _joined(_prefix(base, bases), path) if path else _prefix(base, bases)
    for base, root in roots.items():
        if isinstance(root, nn.Module):
            for path, module in root.named_modules():
                paths[id(module)] = _joined(_prefix(base, bases), path)
    return paths


def _prefix(base: str, bases: dict[str, tuple[str, ...]]) -> str:
    """Several models in one function are told apart by the names that the function has for them."""
    return bases[base][1] if len(bases) > 1 and base else ""


def _joined(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _scopes() -> dict[str, dict[str, Any]]:
    """The local and global names of the function that Dynamo is at."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:
        return {}
    return {"L": dict(output.local_scope), "G": dict(output.global_scope)}


def refuse_parts(gm: fx.GraphModule) -> None:
    """Raise where ``gm`` is a part only of what the caller compiled.

    Raises:
        CompileError: says where Dynamo broke the graph.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        where = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else "?"
        text = reason.reason.splitlines()[0]
    else:
        outer = next(_between(), None)
        if outer is None:
            return
        where = f"{outer.f_code.co_filename}:{outer.f_lineno}"
        text = f"{outer.f_code.co_name} runs outside of the graph"
    raise CompileError(
        f"Dynamo breaks the graph at {where} ({text}), and what a momentum chain computes would depend on where it is "
        "cut: each part starts with a new velocity. Rewrite that line (fullgraph=True shows why it cannot be "
        "followed), compile the model alone and not what is around it, or accept one chain a part with "
        "mfx.backend(..., graph_breaks=True)"
    )


def _between() -> Iterator[Any]:
    """The frames outside of torch between the one that Dynamo is at and the compiled function's caller."""
    frame = sys._getframe()
    while frame is not None and not _is(frame, "convert_frame.py", "__call__"):
        frame = frame.f_back
    while frame is not None and not _is(frame, "eval_frame.py", "compile_wrapper"):
        if not frame.f_code.co_filename.startswith(_TORCH):
            yield frame
        frame = frame.f_back


def _is(frame: Any, file: str, name: str) -> bool:
    return frame.f_code.co_name == name and frame.f_code.co_filename.endswith(os.path.join("_dynamo", file))
