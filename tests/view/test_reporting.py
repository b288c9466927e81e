"""report: the block graph, the text, and that it takes what momentumize takes."""

from __future__ import annotations

import inspect
import json

import networkx as nx
import pytest
import torch
from nets import Net, rows
from torch import Tensor, nn
from torchvision.models import resnet18

import mfx


def test_the_block_graph_of_a_resnet_is_a_line_with_a_row_at_each_node() -> None:
    found = mfx.report(resnet18(weights=None), torch.randn(2, 3, 64, 64))
    graph = found.to_networkx()
    assert list(nx.topological_sort(graph)) == [row.name for row in found.blocks]
    assert nx.is_path(graph, [row.name for row in found.blocks])
    assert graph.number_of_edges() == len(found.blocks) - 1
    for row in found.blocks:
        assert graph.nodes[row.name]["status"] == row.status
        assert graph.nodes[row.name]["activation_bytes"] == row.activation_bytes


class Forked(Net):
    """Two stacks from one stem, and a sum of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Net(2).blocks, Net(2).blocks

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.left(x) * self.right(x))


def test_the_block_graph_forks_where_the_model_does() -> None:
    graph = mfx.report(Forked()).to_networkx()
    assert set(graph.edges) == {("left.0", "left.1"), ("right.0", "right.1")}


def test_the_block_graph_is_the_callers_own() -> None:
    found = mfx.report(Net())
    found.to_networkx().clear()
    assert len(found.to_networkx()) == 3


def test_report_takes_every_argument_of_momentumize_with_the_same_default() -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (mfx.report, mfx.momentumize))
    assert set(ours) - set(theirs) == {"optimizer"}
    assert set(theirs) <= set(ours)
    assert {name: ours[name].default for name in theirs} == {name: theirs[name].default for name in theirs}


@pytest.mark.parametrize("velocity", ["first", lambda chain: nn.Linear(6, 6).double()], ids=["first", "learned"])
def test_a_velocity_is_part_of_what_is_reported_and_nothing_is_drawn(velocity: object) -> None:
    model, x = Net(), rows()
    before = torch.get_rng_state()
    found = mfx.report(model, x, velocity=velocity)  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())
    assert found.memory is not None
    assert found.memory.after > 0
    assert not hasattr(model, "momentum_velocity")
    if velocity == "first":
        assert found.chains[0].gammas == (0.0, 0.9, 0.9)


def test_a_report_is_json() -> None:
    found = json.loads(json.dumps(mfx.report(Net(), rows()).to_dict()))
    assert [row["name"] for row in found["blocks"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found["chains"][0]["stored"] == ""


def test_bytes_are_known_where_dynamo_has_made_a_number_of_the_model_an_input():
    """A dropout's p that is another in each model is an input of what Dynamo captures, whose value is asked for."""
    torch._dynamo.reset()
    found = [mfx.report(Net(p=p), rows(), capture="dynamo").memory for p in (0.1, 0.3, 0.2)]
    torch._dynamo.reset()
    assert found[0] is not None
    assert found[0] == found[1] == found[2]
