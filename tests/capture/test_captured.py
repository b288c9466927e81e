"""Captures of either kind are one thing to whoever reads them: the protocol, and the notes that each owes its graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Block, Net, rows
from torch import Tensor, fx, nn

from mfx.capture import Call, Captured, capture_dynamo, capture_symbolic
from mfx.capture.lifted import prepare
from mfx.capture.symbolic import with_sizes
from mfx.find.whole.named import calls_of
from mfx.graph.notes import DTYPE, LIFTED, RETURNED, SCOPE, SHAPE, Scope


class Model(Net):
    """With a module called twice, a buffer, and an output of several values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(6, dtype=torch.float64))
        self.twice = Block(6).double()

    def forward(self, x: Tensor, factor: float = 2.0) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.blocks(self.stem(x)) * factor + self.shift
        return {"features": x, "logits": self.head(self.twice(self.twice(x)))}


def captures(model: nn.Module, call: Call, named: dict[int, str]) -> list[Captured]:
    forward = type(model).forward
    symbolic = with_sizes(capture_symbolic(model, forward, call.form, named), model, call)
    return [symbolic, capture_dynamo(model, forward, call, named)]


@pytest.fixture
def model() -> nn.Module:
    return Model()


def interpreted(graph: fx.Graph) -> Any:
    class Interpreter(fx.Interpreter):
        def fetch_attr(self, target: str) -> Any:
            owner, _, name = target.rpartition(".")
            return getattr(self.root.get_submodule(owner), name)

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return self.root.get_submodule(target)(*args, **kwargs)

    def run(root: nn.Module, *inputs: Any) -> Any:
        interpreter = Interpreter(nn.Module(), graph=graph)
        interpreter.root = root
        return interpreter.run(*inputs)

    return run


def test_a_capture_run_as_it_is_is_the_model(model: nn.Module) -> None:
    x = rows()
    call = Call((x,), {"factor": 3.0})
    for captured in captures(model, call, {}):
        torch.manual_seed(1)
        got = captured.call(model, call, interpreted(captured.graph))
        torch.manual_seed(1)
        expected = model(x, factor=3.0)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert captured.inputs(model, call)[0] is x


def test_a_capture_holds_for_its_form_and_modes_alone(model: nn.Module) -> None:
    call = Call((rows(),), {"factor": 3.0})
    for captured in captures(model, call, {}):
        assert captured.holds(model, Call((rows(),), {"factor": 3.0}))
        assert not captured.holds(model, Call((rows(),), {"factor": 4.0}))
        assert not captured.holds(model, Call((rows(),), {}))
        with torch.no_grad():
            assert not captured.holds(model, call)
        model.blocks[1].eval()
        assert not captured.holds(model, call)
        model.train()
        assert captured.holds(model, call)


def test_every_node_says_where_it_ran_and_what_it_gives(model: nn.Module) -> None:
    call = Call((rows(),), {})
    for captured in captures(model, call, {}):
        nodes = [node for node in captured.graph.nodes if node.op not in ("output", "placeholder")]
        assert all(isinstance(node.meta[SCOPE], Scope) for node in nodes)
        adds = [node for node in nodes if node.meta[SCOPE].path.startswith("blocks.") and "add" in str(node.target)]
        assert {node.meta[SHAPE] for node in adds} == {(5, 6)}
        assert {node.meta[DTYPE] for node in adds} == {torch.float64}
        ends = {scope.path for node in nodes for scope in node.meta.get(RETURNED, ())}
        assert {"blocks.0", "blocks.1", "blocks.2", "twice"} <= ends
        calls = {scope.call for node in nodes for scope in node.meta.get(RETURNED, ()) if scope.path == "twice"}
        assert calls == {0, 1}


def test_named_modules_are_marked(model: nn.Module) -> None:
    named = {id(model.blocks[index]): f"blocks.{index}" for index in (0, 2)}
    for captured in captures(model, Call((rows(),), {}), named):
        assert [found.path for found in calls_of(captured.graph)] == ["blocks.0", "blocks.2"]


def test_a_lifted_graph_tells_parameters_from_inputs(model: nn.Module, fresh_dynamo: None) -> None:
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        prepare(gm, example_inputs)
        seen.append(gm)
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(rows())
    placeholders = seen[0].graph.find_nodes(op="placeholder")
    kinds = [node.meta.get(LIFTED) for node in placeholders]
    assert kinds.count("parameter") == len(list(model.parameters()))
    assert kinds.count("buffer") == 1
    assert kinds.count(None) == 1
    assert all(SCOPE in node.meta for node in seen[0].graph.nodes)
