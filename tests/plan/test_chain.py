"""Plan: the way each chain runs, with its reason; and that the report says it."""

from __future__ import annotations

import pytest
from graphs import prepared
from nets import Net, rows
from torch import nn

import mfx
from mfx import Reason


def way(model: nn.Module, **options: object) -> Reason | None:
    (chain,) = prepared(model, rows(), **options).plan.chains
    return chain.way.reason


def test_a_chain_runs_reversible_unless_something_speaks_against_it() -> None:
    assert way(Net()) is None
    assert way(Net(), reversible=False) == Reason.STORED_ON_REQUEST


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_the_report_says_what_is_stored_and_why(capture: str) -> None:
    asked = mfx.report(Net(), rows(), capture=capture, reversible=False)
    (row,) = asked.chains
    assert (row.stored, row.state_bytes, row.snapshots) == ("reversible=False", None, None)
    assert "activations are stored as well (reversible=False)" in str(asked)
    assert asked.memory is not None
    assert asked.memory.after >= asked.memory.before
    assert asked.to_dict()["chains"][0]["stored"] == "reversible=False"
