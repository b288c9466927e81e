"""How the suite runs: one thread, fixed seeds, and how many random models the property tests build."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from compiled import handed
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

_common = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.register_profile("dev", _common, max_examples=30)
settings.register_profile("ci", _common, max_examples=500)
# To look for new counterexamples; finds others each time.
settings.register_profile("search", _common, max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before or after, and no graph of another test kept."""
    torch._dynamo.reset()
    handed.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
