"""Joint: which chain goes on from which, where the Python between them is the model's own.

While the module that has the loop over the blocks runs, a :class:`Joint` knows how each chain of that call ended.

1. A chain whose x is the very tensor that another handed out, and unchanged since, goes on from there: with that one's
   velocity, its arithmetic, its distance from the last snapshot (:mod:`mfx.rule.linked`).  Any other x begins a chain
   anew, with v_0 = 0.  A block that a call leaves out is no step of that call.
2. The state between two chains, which the one needs for its backward and the other finds in its own, is held by one of
   the two (:mod:`mfx.run.linked.handover`).
3. Where one of two chains stores its activations and the other does not, or they compute in other dtypes, the velocity
   goes on as a value of its own, and both hold the state.

Known limits: a chain is known as long as the tensor that it handed out is somebody's.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfx.rule import Schedule
from mfx.rule.arithmetic.carry import Floating
from mfx.rule.arithmetic.snapshots import Reached
from mfx.rule.linked import linked, nominal
from mfx.run.chain import ChainSpec, Continue
from mfx.run.linked.handover import Handover, State

_here = threading.local()


@dataclass(frozen=True, eq=False)
class Ended:
    """How a chain ended: its state as ``carry`` has it after ``steps``, and how far it is.

    ``edge`` is what autograd takes for the velocity where the state has no history, ``handover`` what holds the state
    for backward, and ``zeros`` its counts of zeros, from ``counted`` states before.
    """

    state: State
    carry: Floating
    steps: int
    pace: Schedule
    reached: Reached
    edge: Tensor | None = None
    handover: Handover | None = None
    zeros: Tensor | None = None
    counted: int = 0

    @property
    def gradient_goes_by(self) -> Tensor | None:
        """What the gradient of the velocity goes by."""
        return self.state[1] if self.edge is None else self.edge

    def goes_on(self, pace: Schedule, apart: bool) -> bool:
        """Whether a chain of this pace can go on with the state itself; ``apart``: it keeps that from autograd."""
        mine = self.edge is not None
        with_history = mine if torch.is_grad_enabled() else apart
        no_history = not mine and self.state[1] is not None and not self.state[1].requires_grad
        return self.pace == pace and (with_history == apart or no_history)

    def velocity(self) -> Tensor:
        """The velocity as a value with its history."""
        assert self.state[1] is not None
        v = self.carry.velocity(self.steps, self.state[1])
        return v if self.edge is None else Continue.apply(self.edge, v)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Start:
    """What a chain starts from: its schedule, and v_0, or how the chain ``before`` it ended whose state it takes over.

    In a ``joint``, ``reached`` is how far it will be at its end, in the schedule ``pace``.
    """

    plan: Schedule
    velocity: Tensor | None
    before: Ended | None = None
    joint: Joint | None = None
    pace: Schedule | None = None
    reached: Reached | None = None

    def end(self, chain: ChainSpec, x: Tensor, **how: Any) -> None:
        """Note how the chain ended that handed out ``x``."""
        if self.joint is not None and chain.leaves and 0 not in chain.copied:
            assert self.pace is not None and self.reached is not None
            self.joint.note(x, Ended(pace=self.pace, reached=self.reached, steps=len(chain.steps), **how))


class Joint:
    """One call of a module whose own Python joins the chains of its blocks, which have these ``gammas``."""

    def __init__(self, gammas: Sequence[float]) -> None:
        self.gammas = tuple(gammas)
        self._ended: dict[int, tuple[weakref.ref[Tensor], int | Tensor, Ended]] = {}

    def note(self, x: Tensor, ended: Ended) -> None:
        """A chain handed out ``x``."""
        key, known = id(x), self._ended
        gone = weakref.ref(x, lambda _: known.pop(key, None))
        # What is made in inference mode has no version.
        known[key] = (gone, x.clone() if x.is_inference() else x._version, ended)

    def before(self, chain: ChainSpec, x: Tensor) -> Ended | None:
        """How the chain ended that handed out this very ``x``, if ``chain`` may go on from it."""
        reference, stamp, ended = self._ended.get(id(x), (None, 0, None))
        if not chain.opens or reference is None or reference() is not x:
            return None
        same = torch.equal(stamp, x) if isinstance(stamp, Tensor) else stamp == x._version
        return ended if same else None

    def start(self, chain: ChainSpec, before: Ended | None, apart: bool, pace: Schedule) -> Start:
        """What ``chain`` starts from; ``apart`` says that it keeps its state from autograd."""
        goes_on = before is not None and before.goes_on(pace, apart)
        reached = before.reached if before is not None and goes_on else Reached()
        decays = tuple(step.rule.decay for step in chain.steps)
        plan, reached = linked(pace, len(self.gammas), decays, chain.ends[:-1], reached)
        velocity = None if before is None or goes_on else before.velocity()
        return Start(plan, velocity, before if goes_on else None, self, pace, reached)

    def rules(self) -> Any:
        """The rules that all chains are planned for."""
        return nominal(self.gammas)


def joint_of(chain: ChainSpec) -> Joint | None:
    """The joint that ``chain`` is in, if it may have to do with other chains and they are not all plain blocks."""
    joint = getattr(_here, "joint", None)
    return joint if joint is not None and (chain.opens or chain.leaves) and any(joint.gammas) else None


@contextlib.contextmanager
def within(joint: Joint | None) -> Iterator[None]:
    """Chains that run here are in ``joint``."""
    outer, _here.joint = getattr(_here, "joint", None), joint
    try:
        yield
    finally:
        _here.joint = outer
