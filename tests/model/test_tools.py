"""torch's own tools on a momentumized model: the momentum network, or an error with the remedy; never the plain one."""

from __future__ import annotations

import pytest
import torch
from nets import ConvNet, Net, images, rows
from torch import Tensor, nn

import mfx

GAMMA = 0.7
MODELS = pytest.mark.parametrize(("kind", "data"), [(Net, rows), (ConvNet, images)])


class Loop(Net):
    """Its chain runs in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("kind", [Net, Loop])
def test_script_is_refused(kind: type[Net]) -> None:
    mm = mfx.momentumize(kind(p=0.0), GAMMA)
    with pytest.raises(mfx.EntryError, match="cannot be scripted"):
        torch.jit.script(mm)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [Net, Loop])
def test_jit_trace_gives_the_momentum_network(kind: type[Net], grad: bool) -> None:
    mm, x = mfx.momentumize(kind(p=0.0), GAMMA), rows()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(mm, x)
        torch.testing.assert_close(traced(2 * x), mm(2 * x))
    if grad:
        found = torch.autograd.grad(traced(x).square().sum(), list(traced.parameters()))
        torch.testing.assert_close(found, torch.autograd.grad(mm(x).square().sum(), list(mm.parameters())))


@pytest.mark.parametrize("kind", [Net, Loop])
def test_symbolic_trace_names_the_graph_that_there_is(kind: type[Net]) -> None:
    mm = mfx.momentumize(kind(), GAMMA)
    with pytest.raises(mfx.CaptureError, match=r"mfx\.graph_of"):
        torch.fx.symbolic_trace(mm)


def test_dynamo_explains_a_momentumized_model(fresh_dynamo: None) -> None:
    mm, x = mfx.momentumize(Net(p=0.0), GAMMA), rows()
    explained = torch._dynamo.explain(mm)(x)
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0
    assert any("momentum" in str(node.name) for graph in explained.graphs for node in graph.graph.nodes)


def test_export_of_a_symbolically_captured_model_in_evaluation_is_the_same_function() -> None:
    mm, x = mfx.momentumize(Net(), GAMMA).eval(), rows().detach()
    with torch.no_grad():
        exported = torch.export.export(mm, (x,), strict=False).module()
        torch.testing.assert_close(exported(2 * x), mm(2 * x))


def test_the_report_says_that_one_block_alone_has_no_momentum() -> None:
    alone = mfx.report(Net(1), rows())
    assert "chain 0 has one block, so it is x + 0.1 f(x) and has no momentum" in str(alone)
    assert "no momentum" not in str(mfx.report(Net(2), rows()))
    assert "no momentum" not in str(mfx.report(Net(1), rows(), gamma=0.0)), "at gamma 0 it is the model"
    assert isinstance(alone.blocks[0].name, str)
    assert isinstance(mfx.momentumize(Net(1)), nn.Module)
