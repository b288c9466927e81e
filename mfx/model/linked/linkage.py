"""Linkage: which parts of a model its own Python joins to one chain, as one run of the model shows.

A part *opens* a chain if x_0 is an argument of its module, and *leaves* one if x_N is what it returns.  Where a tensor
that one part returned is, the very same, what another takes, the two are linked; so is a part with itself.  The *scope*
of parts that are linked is the smallest module around them that was called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import nn

from mfx.capture import Call
from mfx.model.state import Entry
from mfx.torch_versions import pytree

Part = tuple[nn.Module, Entry]
"""A part that was captured, and the graph of its first call."""
Calls = Mapping[str, Sequence[Call]]
Outputs = Mapping[str, Sequence[Any]]


def scopes_of(parts: Mapping[str, Part], calls: Calls, outputs: Outputs, alike: Mapping[str, str]) -> dict[str, str]:
    """The scope of each part that is linked, by paths.

    ``alike`` names for parts that the run did not come to one that it came to and that stands for them.
    """
    given: dict[int, str] = {}
    for path, (_, entry) in parts.items():
        if any(chain.leaves for chain in entry.passed.rewritten.chains):
            leaves = pytree.tree_leaves(list(outputs.get(path, ())))
            given |= {id(leaf): path for leaf in leaves if isinstance(leaf, torch.Tensor)}
    links = nx.Graph()
    for path, part in parts.items():
        taken = [id(x) for call in calls.get(path, ()) for x in _opened(part, call, calls[path][0])]
        links.add_edges_from((given[one], path) for one in taken if one in given)
    links.add_edges_from(alike.items())
    found: dict[str, str] = {}
    for group in nx.connected_components(links):
        found |= dict.fromkeys(group, _scope(sorted(group), calls))
    return found


def _opened(part: Part, call: Call, first: Call) -> list[torch.Tensor]:
    """x_0 of each chain that a part opens in a call, by the graph of the ``first`` one."""
    module, entry = part
    if call.spec != first.spec:
        return call.tensors  # of another form: it may be any
    places = {node: place for place, node in enumerate(entry.captured.graph.find_nodes(op="placeholder"))}
    opened = [places[chain.input] for chain in entry.passed.plan.chains if chain.input in places]
    inputs = entry.captured.inputs(module, call) if opened else []
    return [inputs[place] for place in opened]


def _scope(paths: list[str], calls: Calls) -> str:
    """The path of the smallest module around all of ``paths`` that was called."""
    split = [path.split(".")[:-1] for path in paths]
    shared = [names[0] for names in zip(*split, strict=False)]
    depth = next((k for k, names in enumerate(zip(*split, strict=False)) if len(set(names)) > 1), len(shared))
    names = shared[:depth]
    while names and not calls.get(".".join(names)):
        names.pop()
    return ".".join(names)
