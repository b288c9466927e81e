"""Momentum models in which chosen steps keep their activations, whatever a budget would choose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

import mfx
from mfx.graph.notes import STATE
from mfx.rewrite import ByRoot, rewrite


def keeping(model: nn.Module, steps: Iterable[int], gamma: float = 0.9, **options: Any) -> nn.Module:
    """The momentum model whose only chain keeps the activations of some steps."""
    mm = mfx.momentumize(model, gamma, **options)
    (owner,) = [module for module in mm.modules() if STATE in module.__dict__]
    momentum = owner.__dict__[STATE]
    entry = momentum.latest_entry()
    passed = entry.passed
    (chain,) = passed.plan.chains
    plan = replace(passed.plan, chains=(replace(chain, kept=frozenset(steps)),))
    rewritten = rewrite(passed.found, plan, ByRoot())
    momentum.entries[-1] = replace(entry, passed=replace(passed, plan=plan, rewritten=rewritten))
    return mm
