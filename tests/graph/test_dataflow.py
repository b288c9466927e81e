"""Dataflow: what depends on what, what shares memory, whose order matters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graphs import net
from torch import nn

from mfx.capture import capture_symbolic, default_form
from mfx.graph.dataflow import Dataflow, analyse
from mfx.graph.resources import GENERATOR


def flow_of(forward, **parts) -> Dataflow:
    model = net(forward, **parts)
    captured = capture_symbolic(model, type(model).forward, default_form(type(model).forward))
    return analyse(captured.graph, model)


def node(flow: Dataflow, name: str):
    return next(node for node in flow.nodes if node.name == name)


def test_a_value_originates_in_the_inputs_it_is_computed_from():
    flow = flow_of(lambda self, x, y: (self.f(x), self.g(y), self.h(x + y)))
    x, y = flow.origins[node(flow, "x")], flow.origins[node(flow, "y")]
    assert x
    assert y
    assert not x & y
    assert [flow.origins[node(flow, name)] for name in "fgh"] == [x, y, x | y]


def test_a_value_made_from_sizes_alone_originates_nowhere():
    flow = flow_of(lambda self, x: self.f(x) + torch.zeros(x.size(0), x.shape[1]))
    assert flow.origins[node(flow, "zeros")] == 0


def test_skip_candidates_are_forgotten_after_the_last_add_that_reads_them():
    def forward(self, x):
        for _ in range(20):
            x = x + self.f(torch.relu(x))
        return x

    flow = flow_of(forward)
    assert max(len(above) for above in flow.ancestors.values()) <= 3


def test_views_and_in_place_results_share_memory_and_copies_do_not():
    def forward(self, x):
        y = self.f(x)
        view = y.view(-1, 2).transpose(0, 1)
        half = view.chunk(2)[0]
        y += 1
        return self.g(y.clone()), half

    flow = flow_of(forward)
    owner = node(flow, "f")
    assert {name for name in flow.memory if flow.memory[name] is owner} == {
        node(flow, name) for name in ("f", "view", "transpose", "chunk", "getitem", "iadd")
    }


def test_the_writers_of_a_memory_are_known_in_order():
    def forward(self, x):
        y = self.f(x)
        y.view(-1).relu_()
        return y.add_(1)

    flow = flow_of(forward)
    assert [writer.name for writer in flow.writers[node(flow, "f")]] == ["relu_", "add_"]


def test_a_functional_batch_norm_writes_to_its_statistics_and_returns_new_memory():
    def forward(self, x):
        return F.batch_norm(self.f(x), self.mean, self.var, training=True)

    flow = flow_of(forward, mean=torch.zeros(4), var=torch.ones(4))
    assert flow.memory[node(flow, "batch_norm")] is node(flow, "batch_norm")
    assert {owner.name for owner in flow.writers} == {"mean", "var"}


def test_reading_an_old_name_after_an_in_place_add_is_noticed():
    def forward(self, x):
        x = self.g(x)
        old = x.view(-1)
        x += self.f(x)
        return self.h(x), old

    flow = flow_of(forward)
    assert flow.stale_reads == {node(flow, "iadd"): node(flow, "output")}


def test_reading_only_the_new_name_after_an_in_place_add_is_not_stale():
    def forward(self, x):
        x = self.g(x)
        x += self.f(x)
        x += self.h(x)
        return x

    assert flow_of(forward).stale_reads == {}


def test_random_operations_share_the_generator():
    flow = flow_of(lambda self, x: self.d(self.f(x)) + torch.rand_like(x), d=nn.Dropout(0.5))
    held = {name.name for name, resources in flow.resources.items() if GENERATOR in resources}
    assert held == {"d", "rand_like"}


def test_a_stateful_module_called_twice_is_shared_and_a_stateless_one_is_not():
    def forward(self, x):
        return self.f(self.norm(self.f(self.norm(x))))

    flow = flow_of(forward, norm=nn.BatchNorm1d(4))
    assert {name.name: set(resources) for name, resources in flow.resources.items()} == {
        "norm": {"norm"},
        "norm_1": {"norm"},
    }


def test_whoever_reads_memory_that_is_written_shares_it_with_the_writer():
    def forward(self, x):
        y = self.f(x)
        read = self.g(y)
        y.relu_()
        return read, self.h(read)

    flow = flow_of(forward)
    assert set(flow.resources) == {node(flow, "g"), node(flow, "relu_")}
