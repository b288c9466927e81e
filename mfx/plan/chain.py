"""The plan, a frozen value: which blocks form chains, by which rules and in which way each chain runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from mfx.errors import Reason
from mfx.find import Block, Rejection
from mfx.graph.notes import DTYPE, MODES, Modes
from mfx.options import Options
from mfx.rule import Rule, Schedule, schedule
from mfx.rule.step import tail_of


@dataclass(frozen=True, eq=False)
class Way:
    """How a chain runs: reversible, or (for a ``reason``, about ``node``) with its activations stored."""

    reason: Reason | None = None
    node: object = None

    @property
    def reversible(self) -> bool:
        """Whether nothing speaks against it."""
        return self.reason is None

    @property
    def text(self) -> str:
        """Why activations are stored; empty where they are not."""
        return "" if self.reason is None else self.reason.text(self.node)


@dataclass(frozen=True, eq=False)
class Chain:
    """Consecutive blocks that share one velocity.

    ``taps`` are states before the last that are read outside the chain, of which it hands out its ``readout``,
    ``escapes`` branch values read
    outside it, both in order.  ``way`` says how it runs.
    ``kept`` are the steps that keep their activations.  A ``plain`` chain runs as the model's own operations, which at
    gamma = 0 it is (M1), so that segments need not end at its blocks.
    ``index`` counts the chains of the plan, ``number`` those of the whole model, and gives the chain its name.
    """

    index: int
    blocks: tuple[Block, ...] = field(repr=False)
    rules: tuple[Rule, ...]
    state_dtype: torch.dtype | str
    tolerance: float | None
    way: Way
    number: int
    taps: tuple[fx.Node, ...] = ()
    readout: str = "x"
    kept: frozenset[int] = frozenset()
    plain: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks' names, in order."""
        return tuple(block.name for block in self.blocks)

    @property
    def input(self) -> fx.Node:
        """x_0."""
        return self.blocks[0].skip

    @property
    def output(self) -> fx.Node:
        """x_N."""
        return self.blocks[-1].output

    @property
    def modes(self) -> Modes | None:
        """What its adds run under; None where the graph switches its modes itself."""
        return self.output.meta.get(MODES)

    @property
    def escapes(self) -> tuple[fx.Node, ...]:
        """The branch values that are handed out."""
        return tuple(node for block in self.blocks for node in block.escapes)

    @property
    def note(self) -> str:
        """Rules and schedule in a line; where the dtype of x is not known, for float32."""
        dtype = self.input.meta.get(DTYPE, torch.float32)
        found = self.schedule(dtype if dtype.is_floating_point else torch.float32)
        rules = ", ".join(dict.fromkeys(map(str, self.rules)))
        how = found.note(self.tail) if self.way.reversible else "activations kept"
        how = f"{how}; the last {len(self.blocks) - self.tail} kept" if 0 < self.tail < len(self.blocks) else how
        how = "the model's own operations" if self.plain else how
        return f"{rules}; {len(self.blocks)} steps; {how}"

    @property
    def gammas(self) -> tuple[float, ...]:
        """The decay of each block's velocity."""
        return tuple(rule.decay for rule in self.rules)

    @property
    def lag(self) -> float | None:
        """By how many blocks the state that branches read lags behind z, by the last rule (:attr:`Rule.coast`)."""
        return self.rules[-1].coast

    @property
    def at_0(self) -> bool:
        """Whether it is what the model computes, and nothing of it can be inverted."""
        return self.way.reversible and all(rule.plain for rule in self.rules)

    @property
    def cuts(self) -> tuple[int, ...]:
        """The steps that start from a tap."""
        return tuple(step for step, block in enumerate(self.blocks[:-1], 1) if block.output in self.taps)

    @property
    def tail(self) -> int:
        """The step from which on all keep their activations, so that nothing there is undone."""
        return tail_of(len(self.blocks), self.kept)

    def schedule(
        self,
        dtype: torch.dtype,
        compute: torch.dtype | None = None,
        float64: bool = True,
        rules: tuple[Rule, ...] | None = None,
        velocities: bool = False,
        cut: bool = True,
    ) -> Schedule:
        """State dtype and snapshots for an input of ``dtype``; see :func:`mfx.rule.arithmetic.snapshots.schedule`.

        It is that of the steps before the ``tail``.  ``rules`` are others than planned, where gamma varies, or (not
        ``cut`` at taps) where chains are linked.
        """
        how = (self.state_dtype, self.tolerance, compute, self.cuts if cut else (), float64, velocities)
        return schedule(self.rules[: self.tail] if rules is None else rules, dtype, *how)


@dataclass(frozen=True)
class Forecast:
    """What a training step needs for activations, in bytes: at its ``peak`` (``where`` that is) and ``after_forward``.

    ``plain`` and ``plain_after_forward`` are those of plain backprop, ``least`` the smallest peak that is possible.
    """

    peak: int
    after_forward: int
    where: str
    plain: int
    plain_after_forward: int
    least: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What is rewritten and what is kept, and why.

    ``segments`` are recomputed from what goes into them, which for the first ``offloaded`` of them, for which it is
    long until backward, waits on the host.
    """

    chains: tuple[Chain, ...]
    rejections: tuple[Rejection, ...]
    options: Options
    segments: tuple[Block, ...] = ()
    offloaded: int = 0
    forecast: Forecast | None = None

    def treatment(self, segment: int) -> str:
        """What is done with a segment."""
        return "offload" if segment < self.offloaded else "recompute"

    @property
    def momentum(self) -> tuple[Chain, ...]:
        """The chains that run as such."""
        return tuple(chain for chain in self.chains if not chain.plain)

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The names of each chain's blocks."""
        return tuple(chain.names for chain in self.chains)

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """For each residual add by name: the names of its chain, none where it is kept."""
        kept: dict[str, tuple[str, ...]] = {row.name: () for row in self.rejections}
        return kept | {name: chain for chain in self.names for name in chain}
