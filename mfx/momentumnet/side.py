"""The momentum side of a MomentumNet: what :mod:`mfx.model.parts` and a compiler ask it for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from mfx.compile.live import Live, new_token
from mfx.errors import OptionError
from mfx.graph.notes import VELOCITY
from mfx.options import Gamma, Options, check_gamma, gamma_of
from mfx.pipeline import WHOLE, Place
from mfx.rule import Rule, Schedule, StepSpec, schedule
from mfx.run import ChainSpec
from mfx.run.detector import Drift


@dataclass(eq=False)
class NetSide:
    """The momentum side of a MomentumNet: a :class:`mfx.model.parts.Part`, which can be compiled."""

    options: Options
    names: tuple[str, ...]
    chain: ChainSpec | None = None
    token: str = field(default_factory=new_token)
    stamp: str = ""
    compiled: WeakSet[Live] = field(default_factory=WeakSet)
    place: Place = WHOLE
    linked: bool = False
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "chain": None, "compiled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, token=new_token(), compiled=WeakSet())

    def change(self, **options: Any) -> None:
        """Run with other options from the next forward on."""
        if options.keys() != {"gamma"}:
            self.token = new_token()
        self.options = replace(self.options, **options)

    def spec(self, steps: tuple[StepSpec, ...]) -> ChainSpec:
        """The chain of ``steps``; all chains of a net share what their backwards measure."""
        drift = Drift() if self.chain is None else self.chain.drift
        planned = partial(_schedule, tuple(step.rule for step in steps), self.options)
        self.chain = ChainSpec("momentum_0", steps, planned, reversible=self.options.reversible, drift=drift)
        return self.chain

    def blocks(self) -> tuple[str, ...]:
        """The names of the functions."""
        return self.names

    def specs(self) -> tuple[ChainSpec, ...]:
        """The chain of the last call."""
        compiled = (chain for live in self.compiled for chain in live.chains)
        return (*compiled, *self.latest())

    def latest(self) -> tuple[ChainSpec, ...]:
        """The chain of the last call outside of compiled code."""
        return () if self.chain is None else (self.chain,)

    def set_gamma(self, gamma: Gamma) -> None:
        """One gamma for all functions."""
        checked = check_gamma(gamma)
        (value, *others) = {gamma_of(checked, name) for name in self.names}
        if others or value is None:
            raise OptionError(f"a MomentumNet has one gamma for all its functions, not {gamma!r}: give a float")
        self.change(gamma=value)

    def expected(self) -> tuple[tuple[str, ...], ...]:
        """All functions are one chain."""
        return (self.names,)

    def added(self, root: Any) -> dict[str, list[nn.Module]]:
        """The function that gives v_0, if it is used."""
        return {VELOCITY: [root.network["init"]]} if root.init_speed else {}


def _schedule(rules: tuple[Rule, ...], options: Options, dtype: torch.dtype, *given: Any, **named: Any) -> Schedule:
    return schedule(rules, dtype, options.state_dtype, options.tolerance, *given, **named)


def names_of(functions: list[nn.Module]) -> tuple[str, ...]:
    """The names of the blocks: where a module is there several times, its first path and a number."""
    paths = [f"network.{functions.index(function)}" for function in functions]
    return tuple(
        f"{path}#{paths[:index].count(path)}" if paths.count(path) > 1 else path for index, path in enumerate(paths)
    )
