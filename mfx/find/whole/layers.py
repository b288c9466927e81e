"""Layers: the residual blocks of one layer (attention and MLP, say) as one wrapped block, ``F(x) = layer(x) - x``.

1. The *layer* of an add is the innermost module around it that stands in a list of modules (:func:`layers_of`), in
   one call of it.
2. Linked blocks, each skip being the block's output before, become one block where they are of one layer.
3. A block that is alone in its layer stays as it is, and so do those that cannot be recomputed together (one writes
   to x in place, say).

At gamma = 0 that is the same function; else one velocity takes in a whole layer, whose MLP then sees the state that its
attention has just left, as in the original, and not one that lags.

Known limits: adds outside of such lists have no layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx, nn

from mfx.find.block import Block, collect, with_members
from mfx.find.check import check
from mfx.find.finder import Found
from mfx.graph.dataflow import Dataflow
from mfx.graph.notes import SCOPE

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

Layer = tuple[str, int]
"""The path of a layer, and which call of it."""


def layers_of(model: nn.Module) -> tuple[str, ...]:
    """The paths of all modules of ``model`` that stand in a list.

    >>> layers_of(nn.Sequential(nn.ReLU(), nn.ModuleDict({"a": nn.ReLU()})))
    ('0', '1', '1.a')
    """
    lists = ((path, module) for path, module in model.named_modules() if isinstance(module, _LISTS))
    return tuple(f"{path}.{name}" if path else name for path, module in lists for name, _ in module.named_children())


def with_layers(found: Found, layers: Collection[str], prefix: str = "") -> Found:
    """``found``, of the module at ``prefix`` in a model that has ``layers``, with the blocks of each as one."""
    groups = _groups(found.flow, found.blocks, frozenset(layers), prefix)
    calls = Counter(path for (path, _), _ in groups)
    merged: dict[Block, Block] = {}
    seen: Counter[str] = Counter()
    for (path, _), blocks in groups:
        name = f"{path}#{seen[path]}" if calls[path] > 1 else path
        seen[path] += 1
        whole = _whole(found.flow, blocks, path.removeprefix(f"{prefix}."), name)
        if whole is not None:
            merged |= dict.fromkeys(blocks, whole)
    return replace(found, blocks=tuple(dict.fromkeys(merged.get(block, block) for block in found.blocks)))


def _groups(
    flow: Dataflow, blocks: Sequence[Block], layers: Collection[str], prefix: str
) -> list[tuple[Layer, list[Block]]]:
    """Linked blocks of one layer, two and more, in order."""
    open_groups: dict[tuple[fx.Node, Layer], list[Block]] = {}
    groups: list[tuple[Layer, list[Block]]] = []
    for block in blocks:
        layer = _layer(block, layers, prefix)
        if layer is None:
            continue
        group = open_groups.pop((block.skip, layer), None)
        if group is None:
            groups.append((layer, group := []))
        group.append(block)
        open_groups[block.output, layer] = group
    return [(layer, group) for layer, group in groups if len(group) > 1]


def _layer(block: Block, layers: Collection[str], prefix: str) -> Layer | None:
    """The layer that a block's add runs in; None where that is in no list."""
    scope = block.add.meta[SCOPE]
    path = ".".join(filter(None, (prefix, scope.path)))
    while path and path not in layers:
        path = path.rpartition(".")[0]
    return (path, scope.call) if path else None


def _whole(flow: Dataflow, blocks: Sequence[Block], path: str, name: str) -> Block | None:
    """The blocks as one; None where they cannot be recomputed together."""
    first, last = blocks[0], blocks[-1]
    whole = collect(flow, "wrapped", first.skip, last.output, last.output, home=path)
    whole = with_members(flow, whole, {node for block in blocks for node in (*block.members, block.output)})
    checked = check(flow, whole, named=True)
    return replace(checked, name=name, adds=sum(block.adds for block in blocks)) if isinstance(checked, Block) else None
