"""Rewrite: the new graph, its momentum nodes, and the branches."""

from __future__ import annotations

import pytest
import torch
from graphs import Part, net, prepared
from torch import nn

from mfx.rewrite.specs import branch_graph


def rewritten(forward, parts=None, **options):
    return prepared(net(forward, **(parts or {})), **options)


def names(graph):
    return [node.name for node in graph.nodes]


def momentum_nodes(graph):
    return [node for node in graph.nodes if node.op == "call_function" and node.name.startswith("momentum_")]


def two_chains(self, x):
    x = x + self.f(x)
    x = self.h(x + self.g(x))
    return x + self.f(x)


def test_each_chain_is_one_momentum_node_and_the_rest_is_as_it_was():
    graph = rewritten(two_chains).rewritten.graph
    assert [node.target.__name__ for node in momentum_nodes(graph)] == ["momentum_0", "momentum_1"]
    assert not [node for node in graph.nodes if node.name.startswith("add")]
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["h"]
    graph.lint()


def test_the_graph_prints_as_python_that_names_the_chains():
    code = rewritten(two_chains).rewritten.code
    assert "momentum_0(root, x, None, (" in code
    compile(code, "printed", "exec")


def test_finding_planning_and_rewriting_leave_the_captured_graph_alone():
    entry = rewritten(two_chains)
    assert [name for name in names(entry.found.flow.graph) if name.startswith("add")] == ["add", "add_1", "add_2"]
    entry.found.flow.graph.lint()


def test_parameters_and_sides_are_operands_of_their_step():
    def forward(self, x, m):
        x = x + self.f(x) * m
        return x + self.f(self.g(x))

    (node,) = momentum_nodes(rewritten(forward).rewritten.graph)
    _root, _x, velocity, first, second = node.args
    assert velocity is None
    assert [operand.name.rpartition("_")[0] or operand.name for operand in first] == ["m", "f", "f"]
    assert [operand.target for operand in second] == ["g.weight", "g.bias", "f.weight", "f.bias"]


def test_a_parameter_with_two_names_in_a_branch_is_one_operand():
    tied = nn.Linear(4, 4)
    (node,) = momentum_nodes(rewritten(lambda self, x: x + self.b(self.a(x)), {"a": tied, "b": tied}).rewritten.graph)
    assert len(node.args[3]) == 2


def test_no_graph_holds_a_tensor():
    entry = rewritten(two_chains)
    assert not hasattr(entry.rewritten.graph.owning_module, "_parameters")
    held = [value for step in entry.rewritten.chains[0].steps for value in vars(step).values()]
    assert not [value for value in held if isinstance(value, (torch.Tensor, nn.Module))]


def test_taps_and_escapes_leave_through_their_chain_in_order():
    def forward(self, x):
        keys = self.f(x)
        first = x + self.g(keys)
        return first + self.h(first), first, keys

    graph = rewritten(forward).rewritten.graph
    (output,) = [node for node in graph.nodes if node.op == "output"]
    assert [(value.args[0].name, value.args[1]) for value in output.args[0]] == [("momentum_0", i) for i in range(3)]


def test_a_value_that_is_written_to_outside_is_handed_out_as_a_copy():
    def forward(self, x):
        first = x + self.f(x)
        second = first + self.g(first)
        return second.relu_(), first

    (chain,) = rewritten(forward).rewritten.chains
    assert chain.copied == {0}


def test_what_all_states_share_is_asked_of_the_first():
    def forward(self, x):
        x = x + self.f(x)
        rows = x.size(0)
        return x + self.g(x), torch.zeros(rows)

    graph = rewritten(forward).rewritten.graph
    (size,) = [node for node in graph.nodes if node.name == "size"]
    assert size.args[0].name == "x"


def test_random_operations_stay_in_their_order():
    def forward(self, x):
        before = self.d(x)
        x = x + self.d(self.f(x))
        x = x + self.d(self.g(x))
        return x, before, torch.rand_like(x)

    assert [
        name for name in names(rewritten(forward, {"d": nn.Dropout()}).rewritten.graph) if name[:2] in ("d", "mo", "ra")
    ] == ["d", "momentum_0", "rand_like"]


def test_a_branch_takes_root_x_and_sides_and_gives_value_and_escapes():
    def forward(self, x, m):
        keys = self.f(x)
        return x + self.g(keys) * m, keys

    entry = rewritten(forward)
    graph = branch_graph(entry.found.blocks[0], entry.found.flow)
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == ["root", "x", "side_0"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    assert [value.name for value in output.args[0]] == ["mul", "f"]


def test_an_add_into_x_leaves_x_alone_in_the_branch():
    part = Part(lambda self, x: torch.relu(x.add_(self.f(x), alpha=2)))
    entry = rewritten(lambda self, x: self.b(self.g(x)), {"b": part})
    graph = branch_graph(entry.found.blocks[0], entry.found.flow)
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.add, torch.relu]
    assert not [node for node in graph.nodes if node.target == "add_"]


@pytest.mark.parametrize("velocity", ["zero", "first"])
def test_given_velocities_need_no_module(velocity):
    (node,) = momentum_nodes(rewritten(lambda self, x: x + self.f(x), velocity=velocity).rewritten.graph)
    assert node.args[2] is None


def test_a_learned_velocity_is_a_module_applied_to_x():
    entry = rewritten(lambda self, x: x + self.f(x), velocity=lambda chain: nn.Linear(4, 4))
    (node,) = momentum_nodes(entry.rewritten.graph)
    assert (node.args[2].target, node.args[2].args[0].name) == ("momentum_velocity.0", "x")
