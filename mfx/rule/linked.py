"""Linked: the schedule of a chain that goes on over separately captured modules.  Pure.

How many steps a call takes is not known before it has ended, so what depends on depth is planned for as many as the
modules have in all, with the decay that forgets most:

1. the *pace* is the schedule of that chain: dtype, arithmetic, first quantum, and the most steps to a kept state;
2. each module's own schedule goes on from what was reached before it, and keeps the state wherever the pace, a tap, or
   a step that forgets the velocity asks for it.  A run of fewer steps than planned for has bits to spare.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from mfx.rule.arithmetic.snapshots import Reached, Schedule
from mfx.rule.base import Rule
from mfx.rule.momentum import Momentum


def nominal(gammas: tuple[float, ...]) -> tuple[Rule, ...]:
    """The rules that the pace of steps with these gammas, or some of them, is planned for."""
    moving = [gamma for gamma in gammas if gamma]
    return (Momentum(min(moving, key=abs, default=0.0)),) * len(gammas)


@functools.lru_cache(maxsize=1024)
def linked(
    pace: Schedule, planned: int, decays: tuple[float, ...], cuts: tuple[int, ...], reached: Reached
) -> tuple[Schedule, Reached]:
    """The schedule of the next steps of a chain, and how far it is then.

    Args:
        pace: the schedule of a chain of ``planned`` steps (:func:`nominal`).
        planned: how many these are.
        decays: of the next steps.
        cuts: those of them before which the state is kept in any case.
        reached: how far the chain is before them.

    >>> import torch
    >>> from mfx.rule.arithmetic.snapshots import schedule
    >>> pace = schedule(nominal((0.9,) * 12), torch.float32)
    >>> plan, reached = linked(pace, 12, (0.9, 0.9), (), Reached(steps=3))
    >>> plan.snapshots, reached.steps, round(reached.product, 2)
    ((), 5, 0.81)
    >>> linked(pace, 12, (0.9, 0.9), (), Reached(steps=11))[0].snapshots
    (1,)
    """
    most, snapshots, now = pace.interval(planned), [], reached
    for step, decay in enumerate(decays):
        fresh = now.steps == 0
        keep = most == 1 or step in cuts or (not fresh and (now.steps >= most or decay == 0))
        if keep:
            snapshots.append(step)
        goes_on = not (keep or fresh)
        now = Reached(now.steps + 1 if goes_on else 1, now.product * decay if goes_on else 1.0, keep)
    runs = 1 + sum(step > 0 for step in snapshots)
    quanta = pace.quanta[:1] * runs
    return replace(pace, snapshots=tuple(snapshots), quanta=quanta, reached=reached), now
