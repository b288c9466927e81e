"""Plan: the way each chain runs, in eager mode and under a compiler, with its reason; and that the report says it."""

from __future__ import annotations

import pytest
import torch
from graphs import net, prepared
from nets import Net, rows
from torch import Tensor, nn

import mfx
from mfx import Reason


class Random(nn.Module):
    """x + f(rrelu(x)): what it draws no compiler can be given again."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.act = nn.RReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.act(x))


def ways(model: nn.Module, **options: object) -> tuple[Reason | None, Reason | None]:
    (chain,) = prepared(model, rows(), **options).plan.chains
    return chain.eager.reason, chain.compiled.reason


def test_a_chain_runs_reversible_unless_something_speaks_against_it() -> None:
    assert ways(Net()) == (None, None)
    assert ways(Net(), reversible=False) == (Reason.STORED_ON_REQUEST, Reason.STORED_ON_REQUEST)
    assert ways(Net(block=Random)) == (None, Reason.UNREPEATABLE)
    assert ways(Net(block=Random), capture="dynamo") == (None, Reason.UNREPEATABLE)


@pytest.mark.parametrize(
    ("module", "repeatable"),
    [
        (nn.Dropout(0.3), True),
        (nn.AlphaDropout(0.3), True),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)), True),
        (nn.Sequential(nn.Linear(4, 4), nn.RReLU()), False),
        (nn.Dropout(0.0), True),
    ],
    ids=str,
)
def test_a_module_taken_whole_is_judged_by_its_parts(module: nn.Module, repeatable: bool) -> None:
    (chain,) = prepared(net(lambda self, x: x + self.m(self.f(x)), m=module), rows(), modules="m").plan.chains
    assert chain.eager.reversible
    assert chain.compiled.reversible is repeatable


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_the_report_says_what_is_stored_and_why(capture: str) -> None:
    compiled = mfx.report(Net(block=Random), rows(), capture=capture)
    (row,) = compiled.chains
    assert row.stored == ""
    assert "rrelu" in row.stored_compiled.lower() or "act" in row.stored_compiled
    assert "under torch.compile its activations are stored" in str(compiled)
    asked = mfx.report(Net(), rows(), capture=capture, reversible=False)
    (row,) = asked.chains
    assert (row.stored, row.state_bytes, row.snapshots) == ("reversible=False", None, None)
    assert "activations are stored as well (reversible=False)" in str(asked)
    assert asked.memory is not None
    assert asked.memory.after >= asked.memory.before
    assert asked.to_dict()["chains"][0]["stored"] == "reversible=False"


def test_compiled_a_chain_runs_in_the_way_that_was_planned(fresh_dynamo: None) -> None:
    model = Net(block=Random)
    mm = mfx.momentumize(model, 0.9)
    with pytest.warns(mfx.CompiledStoredWarning, match="keeps its activations: .* may draw random numbers"):
        torch.compile(mm, fullgraph=True, backend="aot_eager")(rows()).sum().backward()
    quiet = mfx.momentumize(model, 0.9, reversible=False)
    torch.compile(quiet, fullgraph=True, backend="aot_eager")(rows()).sum().backward()  # asked for: no warning
