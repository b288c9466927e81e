"""Regional compilation: blocks that were compiled in place (``block.compile()``) have compiled branches.

1. A chain is asked, whenever it runs, whether modules that its blocks stand in were compiled, and how.
2. The branch of such a block is compiled in the same way (:mod:`mfx.rewrite.compiled`), so that it serves all blocks of
   its structure, and both of its runs.

3. Dynamo guards no hooks, so a branch that calls modules with hooks is not compiled.

Known limits: of a block that is a module taken whole, ``compile()`` is torch's own affair.  The state's arithmetic is
not compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from mfx.errors import CompileError
from mfx.rewrite.compiled import Branches, in_traces
from mfx.rule import StepSpec
from mfx.run import ChainSpec
from mfx.run.operands import modules_of
from mfx.torch_versions import compiled_alike, compiled_like, way_of_compiling

_COMPILED = "_compiled_call_impl"
_made: WeakKeyDictionary[ChainSpec, tuple[list[Any], ChainSpec]] = WeakKeyDictionary()


def as_asked(chain: ChainSpec, root: nn.Module) -> ChainSpec:
    """``chain`` with compiled branches, where that was asked for."""
    asked = [_asked(root, step) for step in chain.steps]
    if not any(asked):
        return chain
    known: list[Any] = []
    asked = [_one_of(known, way) for way in asked]
    before = _made.get(chain)
    if before is None or before[0] != asked:
        steps = tuple(_compiled(step, way) for step, way in zip(chain.steps, asked, strict=True))
        before = _made[chain] = asked, replace(chain, steps=steps)
    return before[1]


def _one_of(known: list[Any], way: Any) -> Any:
    """``way``, or one among those known that is the same: what is compiled in one way is shared."""
    if way is None:
        return None
    for other in known:
        if other is way or compiled_alike(other, way):
            return other
    known.append(way)
    return way


def _compiled(step: StepSpec, way: Any) -> StepSpec:
    if way is None or step.graph is None:
        return step
    branches = Branches(lambda function: compiled_like(way, function), way)
    branch = in_traces(f"mfx {step.name}", branches(step.graph))
    again = in_traces(f"mfx {step.name} again", branches(step.graph, step.moved))
    return replace(step, branch=branch, again=again, compiled=True)


def _asked(root: nn.Module, step: StepSpec) -> Any:
    """How a module around the step's block was compiled, the innermost; None where none was."""
    if step.graph is None or any(map(_has_hooks, modules_of([step], root))):
        return None
    found = None
    for module in _around(root, step.home):
        made = getattr(module, _COMPILED, None) or module.__dict__.get(_COMPILED)
        found = found if made is None else _way(made, step)
    return found


def _has_hooks(module: nn.Module) -> bool:
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(tables)


def _way(made: Any, step: StepSpec) -> Any:
    way = way_of_compiling(made)
    if way is None:
        raise CompileError(
            f"block {step.name!r} was compiled in place, and how cannot be told: compile the whole model "
            "(torch.compile(mm)), whose branches are compiled once each"
        )
    return way


def _around(root: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on a path, without the root, which compiles as a whole."""
    for name in path.split(".") if path else ():
        inner = root._modules.get(name)
        if inner is None:  # the root of a compiler's graph holds no modules
            return
        root = inner
        yield root
