"""Together: steps that nothing inverts and that run in one layer, as one step, which keeps one x for all of them.

A transformer's layer has two residual adds.  At gamma = 0 each step keeps its x, where a checkpoint around the layer
would keep one.  So neighbouring steps of one module become a wrapped step: its branch is all of them, one after the
other, ``G(x) = x_k``.

1. Joined are a few steps whose names have the same module path before ``#``, or two whose modules are the only ones of
   their parent, as long as nobody outside reads a state or a branch value from inside of them.  (Many adds in one
   module are a loop, and no layer.)
2. A state of an earlier step that a later one of them reads stays within the branch.
3. The branch that is recomputed grows, by what its smaller parts keep, some states.  So nothing is joined where that
   saves fewer than `LEAST` states.

Known limits: nothing is joined where steps keep their activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mfx.rule.step import Escape, State, StepSpec, advance
from mfx.run.chain import ChainSpec

MOST = 4
"""How many steps at most become one."""

LEAST = 8
"""How many states joining has to save."""

_known: WeakKeyDictionary[ChainSpec, tuple[ChainSpec, list[range]]] = WeakKeyDictionary()


def together(chain: ChainSpec, operands: Sequence[Sequence[Any]]) -> tuple[ChainSpec, Sequence[Sequence[Any]]]:
    """The chain with joined steps, and their operands; all as they are where nothing is to be joined."""
    if chain.kept:
        return chain, operands
    if chain not in _known:
        _known[chain] = _joined(chain)
    joined, groups = _known[chain]
    if len(groups) == len(chain.steps):
        return chain, operands
    outer = [[value for index in group for value in _outer(chain.steps[index], operands[index])] for group in groups]
    return joined, outer


def _outer(step: StepSpec, operands: Sequence[Any]) -> Sequence[Any]:
    """The values from outside among a step's operands, which are all that it is run with."""
    return operands[: sum(side is None for side in step.sides)]


def _joined(chain: ChainSpec) -> tuple[ChainSpec, list[range]]:
    """The chain with joined steps, and which they are."""
    groups: list[range] = []
    alone = [range(index, index + 1) for index in range(len(chain.steps))]
    for _, found in groupby(range(len(chain.steps)), key=lambda index: _path(chain.steps[index])):
        group = list(found)
        most = MOST if "#" in chain.steps[group[0]].name else 2
        joins = 1 < len(group) <= most and not _is_read_from_outside(chain, range(group[0], group[-1] + 1))
        groups += [range(group[0], group[-1] + 1)] if joins else alone[group[0] : group[-1] + 1]
    groups = groups if len(chain.steps) - len(groups) >= LEAST else alone
    places = {index: number for number, group in enumerate(groups) for index in group}
    steps = tuple(_step(chain, group, places) for group in groups)
    return replace(
        chain, steps=steps, taps=tuple(places[tap] for tap in chain.taps), proven=set(), followed=set()
    ), groups


def _path(step: StepSpec) -> str:
    """The module that a step runs in; the parent of one whose only step it is."""
    path, mark, _ = step.name.partition("#")
    return path if mark else path.rpartition(".")[0]


def _is_read_from_outside(chain: ChainSpec, group: range) -> bool:
    """Whether a tap, or a step after the group, has a value from inside of it."""
    sides = [side for step in chain.steps[group.stop :] for side in step.sides if side is not None]
    escapes = any(chain.steps[index].escapes for index in group)
    return escapes or any(step in group[:-1] for step in (*chain.taps, *(side.step for side in sides)))


def _step(chain: ChainSpec, group: range, places: dict[int, int]) -> StepSpec:
    """One step for the steps of a group."""
    steps = [chain.steps[index] for index in group]
    outside: list[tuple[StepSpec, int]] = []
    reads: list[list[int | State]] = []
    for step in steps:
        reads.append([])
        for number, side in enumerate(step.sides):
            if isinstance(side, State) and side.step in group:
                reads[-1].append(State(side.step - group.start))
            else:
                reads[-1].append(len(outside))
                outside.append((step, number))
    sides = tuple(_moved(step.sides[number], places) for step, number in outside)
    if len(steps) == 1:
        return replace(steps[0], sides=sides)
    statistics = {
        place: step.statistics[number] for place, (step, number) in enumerate(outside) if number in step.statistics
    }
    return replace(
        steps[0],
        name=f"{_path(steps[0])}#*",
        branch=_Branches(steps, reads, again=False),
        again=_Branches(steps, reads, again=True),
        wrapped=True,
        scale=1.0,
        sides=sides,
        parameters=tuple(names for step in steps for names in step.parameters),
        modules=tuple(dict.fromkeys(path for step in steps for path in step.modules)),
        buffers=tuple(dict.fromkeys(place for step in steps for place in step.buffers)),
        statistics=statistics,
        draws=any(step.draws for step in steps),
        sees_grad_mode=any(step.sees_grad_mode for step in steps),
    )


def _moved(side: State | Escape | None, places: dict[int, int]) -> State | Escape | None:
    return None if side is None else replace(side, step=places[side.step])


@dataclass(frozen=True, eq=False)
class _Branches:
    """The branch of joined steps; ``reads`` are the sides of each: a place among all that is given, or from inside."""

    steps: list[StepSpec]
    reads: list[list[int | State]]
    again: bool

    def __call__(self, root: nn.Module, x: Tensor, *sides: Any) -> tuple[Any, ...]:
        states: list[Tensor] = []
        for step, reads in zip(self.steps, self.reads, strict=True):
            given = [sides[read] if isinstance(read, int) else states[read.step] for read in reads]
            (value,) = (step.again if self.again else step.branch)(root, x, *given)
            x = advance(step, x, None, value)[0].to(step.result_dtype(x.dtype, value.dtype))
            states.append(x)
        return (x,)
