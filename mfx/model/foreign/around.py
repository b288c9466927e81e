"""Around: capturing where torch.distributed runs code of its own around modules (:mod:`mfx.sharding`).

Such a module is run by its own call alone.  So the model is captured once with all of them entered, which shows the
chains, and then

1. one that a chain runs through (some of its blocks are inside, others are not) is taken whole, as ``modules=`` would:
   F(x) = module(x) - x;
2. one in which no block runs is called, as a part of whatever it stands in;
3. one in which chains run whole owns them, or holds their owner, and is called by the model's own Python; where a
   captured graph would have to enter it all the same, it is refused (:mod:`mfx.model.foreign.hooks`).

A module with several blocks is one step then, and another function where gamma is not 0.  What a model computes does
not change in silence, so this is for models that are sharded before they are momentumized.  Later, only a module whose
whole map is one block may be taken whole: that is the same function.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from mfx.capture import Call, Captured, named_modules
from mfx.capture.symbolic import SymbolicCapture, capture_general
from mfx.errors import PlanChangedError
from mfx.graph.notes import ENTERED, RETURNED
from mfx.options import Options
from mfx.plan import Plan
from mfx.sharding import is_distributed, refuse_wrapped

Paths = Mapping[int, str]
"""The paths of modules, by their id."""
Names = Sequence[Sequence[str]]
"""The names of each chain's blocks."""


@dataclass(frozen=True)
class Around:
    """A capture, the options by which it was made, and the modules newly taken whole, with how many blocks each has."""

    captured: Captured
    options: Options
    whole: Mapping[str, int] = field(default_factory=dict)


def captured_around(
    root: nn.Module,
    options: Options,
    prefix: str,
    chains: Names | None,
    capture: Callable[[Paths, Paths], Captured],
    planned: Callable[[Captured], Plan],
) -> Around:
    """Capture ``root``.

    Args:
        root: a module that stands at ``prefix`` of the model that the options are about.
        options: those.
        capture: captures it, with some modules taken whole as blocks, and others called (paths by id).
        chains: of earlier captures, if there were any: the function to be kept.
        planned: gives the plan for a capture.

    Raises:
        CaptureError: something is wrapped that cannot run again.
        PlanChangedError: a module that was sharded meanwhile would be another function as one step.
    """
    refuse_wrapped(root, prefix)
    around = _distributed(root, options, prefix)
    whole: dict[str, int] = {}
    if around and (chains is None or _parted(around, chains)):
        entered = planned(capture(named_modules(root, options, prefix), {}))
        parted = _parted(around, entered.names)
        if chains is not None:
            for path in parted:
                _refuse_other_function(path, path.removeprefix(f"{prefix}."), entered)
        whole = {path: len(_blocks(path, entered.names)) for path in parted}
        options = replace(options, modules=(*options.modules, *map(glob.escape, parted)))
        chains = entered.names
    return Around(capture(named_modules(root, options, prefix), _called(around, chains or (), prefix)), options, whole)


def general_around(
    root: nn.Module, forward: Any, call: Call, places: tuple[int, ...], options: Options, prefix: str, chains: Names
) -> SymbolicCapture | None:
    """:func:`mfx.capture.symbolic.capture_general` of a model that was captured before."""
    called = _called(_distributed(root, options, prefix), chains, prefix)
    return capture_general(root, forward, call, places, named_modules(root, options, prefix), called)


def _distributed(root: nn.Module, options: Options, prefix: str) -> dict[str, nn.Module]:
    """The modules inside ``root`` that torch.distributed runs code around, by path in the model.

    Without those that nobody enters: modules of torch's own that have no others inside, and those inside of others that
    are taken whole.
    """
    found = {}
    named: tuple[str, ...] | None = None
    for path, module in root.named_modules(remove_duplicate=False):
        simple = type(module).__module__.startswith("torch.nn.") and not module._modules
        if path and not simple and is_distributed(module):
            if named is None:
                named = tuple(named_modules(root, options, prefix).values())
            if not any(_is_inside(path, outer) for outer in named):
                found[f"{prefix}.{path}" if prefix else path] = module
    return found


def _is_inside(name: str, path: str) -> bool:
    """Whether a module, or a block, is the module at ``path`` or inside of it."""
    return f"{name.partition('#')[0]}.".startswith(f"{path}.")


def _blocks(path: str, chains: Names) -> list[str]:
    return [name for chain in chains for name in chain if _is_inside(name, path)]


def _parted(paths: Iterable[str], chains: Names) -> list[str]:
    """The outermost of ``paths`` that some chain runs through."""
    found: list[str] = []
    for path in sorted(paths, key=len):
        through = any(len({_is_inside(name, path) for name in chain}) == 2 for chain in chains)
        if through and not any(_is_inside(path, outer) for outer in found):
            found.append(path)
    return sorted(found)


def _called(around: Mapping[str, nn.Module], chains: Names, prefix: str) -> Paths:
    """Those in which no block runs, by id, with their paths in the captured module."""
    called = ((path, module) for path, module in around.items() if not _blocks(path, chains))
    return {id(module): path.removeprefix(f"{prefix}.") for path, module in called}


def _refuse_other_function(path: str, inner: str, plan: Plan) -> None:
    """Raise where the module is more than one block of the plan, whose skip it takes and whose value it returns.

    ``inner`` is its path in the captured module.
    """
    blocks = [block for chain in plan.chains for block in chain.blocks if _is_inside(block.name, path)]
    if len(blocks) == 1 and blocks[0].name == path:
        (block,) = blocks
        if _marks(block.skip, ENTERED, inner) and _marks(block.output, RETURNED, inner):
            return
    names = ", ".join(block.name for block in blocks)
    raise PlanChangedError(
        f"{path!r} was sharded after mfx.momentumize (fully_shard, parallelize_module), and the steps in it ({names}) "
        "are not one step of the whole module. Hooks of torch.distributed run on its calls alone, so all of it would "
        "have to be one step, which is another function. Call mfx.momentumize after sharding, which takes such modules "
        f"whole, or make it a block before: modules={path!r}, or granularity='layer' for layers"
    )


def _marks(node: fx.Node, note: str, path: str) -> bool:
    return any(scope.path == path for scope in node.meta.get(note, ()))
