"""Closing: the autograd node through which all values of a segment of a chain leave, and at which its backward starts.

:class:`Rewind` is made when a backward begins: it holds the state, which each step takes as it is after it and leaves
as it was before (:mod:`mfx.rule.arithmetic.carry` computes it).  Where the state is known, what was reconstructed is
held against it (:mod:`mfx.run.detector`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from mfx.errors import BackwardError
from mfx.memory import values_of
from mfx.rule.arithmetic.zeros import with_zeros
from mfx.rule.step import branch_of
from mfx.rule.varying import Varying, gradient_of_gamma
from mfx.run.chain import ChainSpec
from mfx.run.detector import Distance, pieces, size_of
from mfx.run.linked.handover import Handover
from mfx.run.recompute import saved_tensors
from mfx.run.tape import Left, Recorder, Setting, Slot, State
from mfx.torch_versions import FakeTensor, graph_is_kept, not_followed

After = tuple["Tensor | None", "Tensor | None"]


class Close(torch.autograd.Function):
    """``(x, v, escapes, held) -> (x in the model's dtype, v, escapes, held)``; saves the end state, v_0, the snapshots.

    v has values only where it is read out; at the end of a chain it is None elsewhere.
    ``held`` are the tensors that hooks or modules kept.  They leave as they are, the same objects, with this node as
    their history: autograd takes them for changed in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        setting: Setting,
        recorder: Recorder,
        slot: Slot,
        start: Tensor | None,
        edge_x: Tensor,
        edge_v: Tensor,
        held: int,
        *values: Any,
    ) -> Any:
        ctx.set_materialize_grads(False)
        x, v = recorder.state
        kept = [tensor for pair in recorder.snapshots.values() for tensor in pair if tensor is not None]
        kept = _apart(kept, values[len(values) - held :])
        inverts = recorder.end - 1 not in setting.plan.snapshots
        assert v is not None
        end = _apart([x, v], values[len(values) - held :]) if inverts else []
        size = None if inverts else size_of(x)
        ctx.slot, ctx.handover = slot, None
        ctx.left = recorder.left = Left.of(setting, recorder, start is not None, size)
        if setting.linked and inverts:
            ctx.handover = recorder.handover = Handover((end[0], end[1]), recorder.zeros)
            end = []
        once = [tensor for tensor in (start, recorder.zeros if ctx.left.counts else None) if tensor is not None]
        ctx.save_for_backward(*end, *once, *kept)
        recorder.snapshots = {}
        velocity = _velocity_out(setting, recorder.end, v, edge_v)
        escapes, kept = values[: len(values) - held], values[len(values) - held :]
        ctx.mark_dirty(*kept)
        escapes = [_alias(value) for value in escapes]
        ctx.mark_non_differentiable(*compress(escapes, _constants(escapes, ctx.needs_input_grad[7:])))
        return (_alias(x.to(recorder.dtype)), velocity, *escapes, *kept)

    @staticmethod
    @not_followed
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_double_backward(ctx.left.setting.chain)
        ctx.slot.rewind = rewind_of(ctx)
        if ctx.handover is not None and not graph_is_kept():
            ctx.handover.clear()
        grad_x, grad_v, *others = grads
        return None, None, None, None, grad_x, grad_v, None, *ctx.slot.corrected(others)


def _velocity_out(setting: Setting, end: int, v: Tensor, edge: Tensor) -> Tensor | None:
    """v as a closing node gives it, from what is carried for it and what autograd takes for it."""
    if setting.chain.coast(end - 1) is not None:
        return _alias(setting.carry.velocity(end, v).to(edge.dtype))
    last = end == len(setting.chain.steps) and not (setting.linked and setting.chain.leaves)
    return None if last else _alias(edge)


def rewind_of(ctx: Any) -> Rewind:
    """The beginning of a way back through the segment that a :class:`Close` ends, from that node's context."""
    left: Left = ctx.left
    saved = iter(saved_tensors(ctx, f"an output of {left.setting.chain.name}, or a value it keeps,"))
    linked: Handover | None = ctx.handover
    end = (next(saved), next(saved)) if left.inverts_last and linked is None else None
    start, zeros = (next(saved) if there else None for there in (left.starts, left.counts))
    snapshots = {index: (next(saved), next(saved) if both else None) for index, both in left.layout}
    if linked is not None:
        end, zeros = linked.get(left.setting.chain.name)
    return Rewind(left, end, start, snapshots, zeros)


class Rewind:
    """The state of a segment while a backward runs: ``state`` is the one after the step whose turn is next.

    Args:
        left: what forward left.
        end: (x, v) after the last step as carried, if kept.
        start: v_0, if there is one.
        snapshots: the states kept before steps.
        zeros: for how many states each element was 0.
    """

    def __init__(
        self,
        left: Left,
        end: State | None,
        start: Tensor | None,
        snapshots: dict[int, State],
        zeros: Tensor | None = None,
    ) -> None:
        self.left = left
        self.zeros = zeros
        self.start = start
        self.snapshots = snapshots
        self.state = end
        self.position = left.begin + len(left.traces)
        carry = left.setting.carry
        self.scale = None if end is None or end[1] is None else size_of(carry.velocity(self.position, end[1]))
        self.drifts: list[Tensor] = []
        self.over = False  # nobody else has the state: the one before may be written over it

    def before(self, index: int) -> tuple[Tensor, Tensor | None, After]:
        """x_i, v_i where it is kept, and what is needed of the state after the step, all as carried and let go here."""
        setting = self.left.setting
        if self.position != index + 1:
            raise out_of_turn(setting.chain, index)
        self.position = index
        after, self.state = self.state, None
        if index in self.snapshots:
            return *self.snapshots.pop(index), after or (None, None)
        assert after is not None
        x, v = after
        assert v is not None
        x = setting.carry.x_before(index, x, v, self.over)
        x = with_zeros(x, self.zeros, self.left.counted + index - self.left.begin)
        x = _with_strides(x, self.left.strides(index))
        return x.to(self.left.state_dtype(index)), None, (None, v)

    def leave(self, index: int, x: Tensor, v: Tensor | None) -> None:
        """Take the state before a step; after the last one give it back, where it is another's, and the drift away."""
        if index != self.left.first:
            self.state = (x, v)
            read = self.left.traces[index - self.left.begin].dtype
            self.over = index not in self.left.setting.plan.snapshots and self.left.setting.apart(x, read)
            return
        if self.left.back is not None:
            self.left.back((x, v), self.zeros)
        if self.drifts:
            setting = self.left.setting
            worst, begin = torch.stack(self.drifts).amax(), self.left.begin
            setting.chain.drift.record(worst, setting.chain.name, setting.plan.tolerance, begin)

    def check(self, index: int, x: Tensor, v: Tensor | None, after: After, value: Tensor) -> None:
        """Hold one step from a known state against the state after it that was reconstructed (or kept), by pieces."""
        setting = self.left.setting
        starts = index == 0 and not self.left.goes_on
        known = starts or v is not None or setting.chain.steps[index].rule.forgets
        gone = all(one is None for one in after)
        if not known or (gone and self.left.size is None) or isinstance(x, FakeTensor):
            return
        v = self.start if starts else v
        drift, carry = Distance(), setting.carry
        whole = setting.chain.steps[index].rule.scattered
        for x_i, v_i, value_i, x_after, v_after in pieces(x, v, value.detach(), *after, whole=whole):
            expected_x, expected_v = carry.advance(index, x_i, v_i, value_i)
            if x_after is not None:
                drift.add(0, expected_x, x_after)
            elif v_after is None:
                drift.add(0, expected_x)
            if v_after is not None:
                drift.add(1, carry.velocity(index + 1, expected_v), carry.velocity(index + 1, v_after))
        self.drifts.append(drift.relative(self.scale, self.left.size if gone else None))


class Turn:
    """The backward of one step: what it has of the state, and lets go as soon as it is not needed any more.

    ``x`` and ``known`` are the state before the step, as far as it is there; ``inside`` is x as the step computes with
    it; ``divides`` says that v has to be found from the branch's value.  Where the gradient of gamma is asked for,
    ``total`` is the sum of those of x' and v', and ``of_gamma`` is it afterwards.
    """

    def __init__(self, rewind: Rewind, index: int, total: Tensor | None = None) -> None:
        left = rewind.left
        setting, rule = left.setting, left.setting.chain.steps[index].rule
        kept = index in setting.plan.snapshots
        self.rewind, self.index = rewind, index
        self.x, self.known, self.after = rewind.before(index)
        self.inside, self.v = setting.carry.enter(index, self.x, self.known)
        wanted = index != left.first or left.back is not None or setting.observer is not None
        self.divides = not kept and not rule.forgets and (wanted or (total is not None and index > 0))
        self.total, self.of_gamma = total, None
        self.checks = index == 0 or kept

    def pass_on(self, value: Tensor | None) -> None:
        """Leave the state before the step to the step before, by the branch's value where that was computed."""
        setting, index = self.rewind.left.setting, self.index
        if value is not None and self.checks:
            self.rewind.check(index, self.inside, self.v, self.after, value)
        if value is not None and self.divides:
            assert self.after[1] is not None
            self.known = setting.carry.v_before(index, self.inside, self.after[1], value, self.rewind.over)
        if value is not None and self.total is not None:
            self.of_gamma = self._of_gamma(value)
        setting.observe(index, self.inside, self.known)
        self.rewind.leave(index, self.x, self.known)
        del self.x, self.known, self.after, self.inside, self.v

    def _of_gamma(self, value: Tensor) -> Tensor:
        """The gradient of gamma, from v before the step and the branch's value."""
        setting, index = self.rewind.left.setting, self.index
        step, assigned = setting.chain.steps[index], self.rewind.start if index == 0 else self.known
        v = None if assigned is None else setting.carry.velocity(index, assigned)
        assert self.total is not None and isinstance(step.rule, Varying)
        branch = branch_of(step, self.inside, value.to(self.inside.dtype))
        return gradient_of_gamma(step.rule.gamma.shape, self.total, v, branch)


def out_of_turn(chain: ChainSpec, index: int) -> BackwardError:
    """The error for a step whose backward comes when it cannot."""
    return BackwardError(
        f"{chain.name}: block {chain.steps[index].name!r} ran out of turn in backward; a backward through a chain has "
        "to start at the chain's outputs. A loss on a view that a hook makes of what it sees has to be added to one on "
        "an output; let the hook keep a copy (.clone()), or what it sees, and make the view after the model has run"
    )


def refuse_double_backward(chain: ChainSpec) -> None:
    """Raise where a graph of the backward is asked for (M8)."""
    if torch.is_grad_enabled():
        raise BackwardError(
            f"{chain.name}: create_graph=True (double backward) is not supported by the reversible run. "
            "Use reversible=False, which stores activations and can be differentiated any number of times"
        )


def _apart(kept: list[Tensor], held: tuple[Any, ...]) -> list[Tensor]:
    """Copies of the tensors that share memory with one that is held, and so its version, which marking it moves."""
    storages = {values_of(value).untyped_storage()._cdata for value in held}
    return [one.clone() if values_of(one).untyped_storage()._cdata in storages else one for one in kept]


def _constants(values: Sequence[Any], needed: Sequence[bool]) -> list[bool]:
    """Which of the values are tensors without history, as those of frozen blocks before the first that is not."""
    return [isinstance(value, Tensor) and not need for value, need in zip(values, needed, strict=False)]


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    # Along a stride of 0 (expand) all values are one; it is written once.
    single = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    return torch.empty_strided(single.shape, strides, dtype=x.dtype, device=x.device).copy_(single).expand(x.shape)
