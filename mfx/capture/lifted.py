"""Lifted graphs: parameters and buffers are placeholders, as in the graphs that Dynamo makes; their notes.

1. :func:`mark` tells which placeholders are parameters and buffers, and in which module's forward each node ran,
   so that a lifted graph carries the notes of one of :mod:`mfx.capture.tracer`.
2. :func:`note_modes` tells which modes each node runs under; the nodes that switch them are left out of what is made of
   the graph, which switches where it has to (:mod:`mfx.rewrite.switches`).
3. :func:`prepare` does so for a graph as Dynamo hands it to a backend, where paths are relative to the model.

Source: ``nn_module_stack`` as written by torch/_dynamo/output_graph.py, alike in torch 2.11 and 2.15.
Known limits: modules that neither the compiled function's arguments nor its globals hold directly are named by
Dynamo's own expression for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from mfx.capture.named import Called
from mfx.capture.tracer import Constant
from mfx.graph.dataflow import get_attribute
from mfx.graph.notes import DTYPE, DTYPE_KEPT, FRAMES, LIFTED, MODES, RETURNED, SCOPE, SHAPE, Modes, Scope
from mfx.graph.operations import is_ambient, name_of
from mfx.memory import shape_of
from mfx.torch_versions import dynamo, is_lifted_number, source_name, source_of

_FRAME = re.compile(r'File "([^"]+)", line \d+, in (\w+)')
_BASE = re.compile(r"^([LG])\['([^']+)'\]")


def prepare(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Note on the nodes of ``gm``, as Dynamo hands it over, what planning needs."""
    kinds = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        kind = kind_of(node, value)
        if kind:
            kinds[node] = kind
    mark(gm.graph, kinds, module_paths(gm.graph))
    note_modes(gm.graph)
    for node in gm.graph.nodes:
        note_shape(node)


def kind_of(node: fx.Node, value: Any) -> str:
    """Whether a placeholder is a ``"parameter"``, a ``"buffer"``, a ``"number"``, or (empty) an input."""
    if isinstance(value, nn.Parameter):
        return "parameter"
    # Dynamo hands floats that may change as tensors, with an item() in the graph.
    if not isinstance(value, torch.Tensor) or is_lifted_number(node):
        return "number"
    source = source_of(node)
    return "buffer" if source is not None and "._buffers[" in source_name(source) else ""


def note_shape(node: fx.Node) -> None:
    """Note shape and dtype of a node's value where Dynamo knows them."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return
    node.meta[SHAPE] = tuple(_size(size) for size in shape_of(value))
    node.meta[DTYPE] = value.dtype
    if node.op == "call_method" and node.target in ("to", "type_as", "float", "double", "half", "bfloat16"):
        source = node.all_input_nodes[0].meta.get("example_value")
        node.meta[DTYPE_KEPT] = isinstance(source, torch.Tensor) and source.dtype == value.dtype


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
    scopes = _names_in_scope()
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


def _names_in_scope() -> dict[str, dict[str, Any]]:
    """The local and global names of the function that Dynamo is at."""
    try:
        output = dynamo().InstructionTranslator.current_tx().output
    except AttributeError:
        return {}
    return {"L": dict(output.local_scope), "G": dict(output.global_scope)}


def mark(graph: fx.Graph, kinds: Mapping[fx.Node, str], modules: Mapping[int, str]) -> dict[str, int]:
    """Note on each node what planning needs; gives how often each module's forward ran, by path.

    Args:
        graph: a graph of torch-level operations with ``nn_module_stack`` in its nodes' meta.
        kinds: ``"parameter"`` or ``"buffer"`` for the placeholders that are one.
        modules: path of each module, by its id.
    """
    calls: dict[str, dict[tuple[str, ...], int]] = {}
    stacks: dict[fx.Node, tuple[Scope, ...]] = {}
    for node in graph.nodes:
        stacks[node] = _scopes(node, modules, calls)
        node.meta[SCOPE] = stacks[node][-1]
        node.meta[FRAMES] = tuple(_FRAME.findall(node.meta.get("stack_trace") or ""))
        if node in kinds:
            node.meta[LIFTED] = kinds[node]
    for node in graph.nodes:
        left = {scope for scope in stacks[node] for user in node.users if scope not in stacks[user]}
        node.meta[RETURNED] = left
    return {path: len(chains) for path, chains in calls.items()}


def note_modes(graph: fx.Graph) -> None:
    """Note what each node runs under, if the graph switches grad mode and autocast only, and leaves them as before."""
    now = entry = Modes.current()
    noted: dict[fx.Node, Modes] = {}
    entered: dict[object, Modes] = {}
    for node in graph.nodes:
        noted[node] = now
        if is_ambient(node):
            after = _after(node, now, entered)
            if after is None:
                return
            now = after
    if now == entry:
        for node, modes in noted.items():
            node.meta[MODES] = modes


def _after(node: fx.Node, now: Modes, entered: dict[object, Modes]) -> Modes | None:
    """The modes after a switch; None for one of another kind."""
    name = name_of(node)
    if name == "_set_grad_enabled":
        return replace(now, grad=bool(node.args[0]))
    if name == "_exit_autocast":
        return replace(now, autocast=entered[node.args[0]].autocast)
    if name == "_enter_autocast":
        entered[node] = now
        kind, dtype, enabled = node.args[:3]
        other: Any = (kind, enabled, (dtype or torch.get_autocast_dtype(str(kind))) if enabled else None)
        return replace(now, autocast=tuple(other if state[0] == kind else state for state in now.autocast))
    return None


def _scopes(
    node: fx.Node, modules: Mapping[int, str], calls: dict[str, dict[tuple[str, ...], int]]
) -> tuple[Scope, ...]:
    """The module calls in which a node ran, from the root inwards."""
    scopes = [Scope("", 0)]
    chain: tuple[str, ...] = ()
    for key in node.meta.get("nn_module_stack") or {}:
        chain = (*chain, key)
        identity = key.partition("@")[0]
        path = modules.get(int(identity)) if identity.isdigit() else None
        if path:
            seen = calls.setdefault(path, {})
            scopes.append(Scope(path, seen.setdefault(chain, len(seen))))
    return tuple(scopes)


def relative(gm: fx.GraphModule, kinds: dict[fx.Node, tuple[str, str]]) -> tuple[fx.Graph, tuple[int, ...]]:
    """The graph with the model's own tensors by path, and which of the original's inputs it takes."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Constant] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    taken = tuple(index for index, node in enumerate(placeholders) if node not in kinds)
    for index in taken:
        env[placeholders[index]] = graph.node_copy(placeholders[index])
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            value = get_attribute(gm, str(node.target))
            constant = constants.setdefault(str(node.target), Constant(value, len(constants)))
            env[node] = graph.call_function(constant)
            env[node].meta = dict(node.meta)
            continue
        if isinstance(node.target, Called):
            node.op, node.target = "call_module", node.target.path
        # Each reader asks for a tensor of the model itself, as in a traced graph: it belongs to the reader's block.
        own = {source: _ask(graph, node, source, kinds) for source in node.all_input_nodes if source in kinds}
        env[node] = graph.node_copy(node, lambda source, own=own: own[source] if source in own else env[source])
    return graph, taken


def _ask(graph: fx.Graph, reader: fx.Node, source: fx.Node, kinds: dict[fx.Node, tuple[str, str]]) -> fx.Node:
    node = graph.create_node("get_attr", kinds[source][1], (), {}, name=source.name)
    node.meta = {**source.meta, SCOPE: reader.meta[SCOPE]}
    node.meta.pop(LIFTED, None)
    return node
