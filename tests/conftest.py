"""How the suite runs: one thread, fixed seeds, and how many random models the property tests build."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiled import driven, handed
from hypothesis import HealthCheck, Phase, settings

from mfx.compile import as_backend, inside
from mfx.compile.pieces import in_pieces

torch.set_num_threads(1)
collect_ignore = ["mutations.py"]

# Whether drawing is too slow depends on the machine, so that a run would not be repeatable; the other checks stay on.
# Explaining a failure takes longer than finding it.
_phases = [phase for phase in Phase if phase is not Phase.explain]
_common = settings(deadline=None, print_blob=True, phases=_phases, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", _common, max_examples=30, derandomize=True)
settings.register_profile("ci", _common, max_examples=32, derandomize=True)
# Fresh examples each time; says how to repeat a failure, and keeps it in .hypothesis/ for the next run.
settings.register_profile("search", _common, max_examples=2000, derandomize=False)
# Whether a failure is found, not which is the smallest.
settings.register_profile("mutations", _common, max_examples=30, derandomize=True, phases=[Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before or after, no graph of another test kept; those that are rewritten are."""
    torch._dynamo.reset()
    handed.clear()
    driven.clear()

    def watched(gm: Any, branches: Any) -> Any:
        driven.append(gm)
        return in_pieces(gm, branches)

    for module in (as_backend, inside):
        monkeypatch.setattr(module, "in_pieces", watched)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _garbage_is_looked_for_among_new_objects() -> None:
    """Of the millions of objects that torch and Dynamo keep, each ``gc.collect()`` would take seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
