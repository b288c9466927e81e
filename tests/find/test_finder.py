"""Find: what is a residual block, what belongs to it, and what it is called."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import Part, X, case, found, only_block
from torch import nn


def in_place(self, x):
    x = self.g(x)
    x += self.f(x)
    return x


def into_the_branch(self, x):
    y = self.f(x)
    y += x
    return y


def scaled(x, f):
    return x.add_(f(x), alpha=2)


@pytest.mark.parametrize(
    ("forward", "scale", "written", "parts"),
    [
        case("x + f(x)", lambda self, x: x + self.f(x), 1, ""),
        case("f(x) + x", lambda self, x: self.f(x) + x, 1, ""),
        case("x += f(x)", in_place, 1, "skip"),
        case("f += x", into_the_branch, 1, "branch"),
        case("operator.iadd(f, x)", lambda self, x: operator.iadd(self.f(x), x), 1, "branch"),
        case("torch.add", lambda self, x: torch.add(x, self.f(x)), 1, ""),
        case("torch.add by keyword", lambda self, x: torch.add(input=x, other=self.f(x)), 1, ""),
        case("torch.add with alpha", lambda self, x: torch.add(x, self.f(x), alpha=0.5), 0.5, ""),
        case("torch.add of the skip with alpha 1", lambda self, x: torch.add(self.f(x), x, alpha=1), 1, ""),
        case("Tensor.add", lambda self, x: x.add(self.f(x)), 1, ""),
        case("Tensor.add_ into the branch", lambda self, x: self.f(x).add_(x), 1, "branch"),
        case("Tensor.add_ into the skip", lambda self, x: scaled(self.g(x), self.f), 2, "skip"),
        case("x - f(x)", lambda self, x: x - self.f(x), -1, ""),
        case("torch.sub with alpha", lambda self, x: torch.sub(x, self.f(x), alpha=0.5), -0.5, ""),
        case("aten.add", lambda self, x: torch.ops.aten.add.Tensor(x, self.f(x)), 1, ""),
        case("aten.add_", lambda self, x: torch.ops.aten.add_.Tensor(self.f(x), x), 1, "branch"),
    ],
)
def test_every_form_of_a_residual_add_is_a_block(forward, scale, written, parts):
    block = only_block(forward, parts)
    assert (block.kind, block.scale, block.written) == ("residual", scale, written)


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("identity module", lambda self, x: self.i(x) + self.f(x), i=nn.Identity()),
        case("dropout module with p 0", lambda self, x: self.i(x) + self.f(x), i=nn.Dropout(0.0)),
        case("dropout with p 0", lambda self, x: F.dropout(x, 0.0) + self.f(x)),
        case("contiguous", lambda self, x: self.f(x) + x.contiguous()),
        case("clone", lambda self, x: x.clone() + self.f(x)),
        case("cast to the same dtype", lambda self, x: x.to(torch.float64) + self.f(x)),
        case("several of them", lambda self, x: self.i(x.contiguous()).clone() + self.f(x), i=nn.Identity()),
        case("empty container", lambda self, x: self.i(x) + self.f(x), i=nn.Sequential()),
    ],
)
def test_operations_that_do_nothing_do_not_hide_the_skip(forward, parts):
    assert only_block(forward, parts, X).skip.name == "x"


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("a module", lambda self, x: x + self.f(x)),
        case("a parameter of the root", lambda self, x: x + x * self.p, p=nn.Parameter(torch.ones(4))),
        case("a weight used functionally", lambda self, x: x + F.linear(x, self.f.weight)),
        case("a value computed from a parameter", lambda self, x: x + x * torch.exp(self.f.weight[0])),
        case("a module in a module", lambda self, x: x + self.s(x), s=nn.Sequential(nn.ReLU(), nn.Linear(4, 4))),
    ],
)
def test_parameters_are_found_wherever_a_branch_takes_them_from(forward, parts):
    assert only_block(forward, parts).kind == "residual"


def test_values_from_outside_the_branch_are_sides():
    def forward(self, x, m):
        return x + self.f(x) * m

    assert [side.name for side in only_block(forward, {}).sides] == ["m"]


def test_branch_values_read_elsewhere_are_escapes():
    def forward(self, x):
        keys = self.f(x)
        return x + self.g(keys), keys, self.h(keys)

    assert [node.name for node in only_block(forward, {}).escapes] == ["f"]


def test_assertions_and_queries_are_part_of_the_branch_and_no_escape():
    def forward(self, x):
        torch._assert(x.is_floating_point(), "x")
        y = self.f(x).view(x.size(0), -1)
        torch._assert(y.is_floating_point(), "y")
        return x + y.reshape(x.shape)

    block = only_block(forward, {})
    assert not block.escapes
    assert not block.sides
    assert sum(node.name.startswith("_assert") for node in block.members) == 1


def test_a_shape_read_elsewhere_hands_out_the_shape_and_not_the_value():
    def forward(self, x):
        y = self.f(x)
        size = y.size()
        return x + y, size

    assert [node.name for node in only_block(forward, {}).escapes] == ["size"]


def test_a_side_value_computed_in_the_blocks_own_module_belongs_to_it():
    block = only_block(
        lambda self, x: self.b(x), {"b": Part(lambda self, x: x + self.f(x) * torch.exp(self.g.weight[0]))}
    )
    assert "exp" in [node.name for node in block.members]
    assert not block.sides


def post_activation(self, x):
    return torch.relu(x + self.f(x))


ONE = lambda: Part(lambda self, x: x + self.f(x))  # noqa: E731
TWO = lambda: Part(lambda self, x: (x := x + self.f(x)) + self.g(x))  # noqa: E731


@pytest.mark.parametrize(
    ("forward", "names", "parts"),
    [
        case("one in a module", lambda self, x: self.a(x), ["a.1"], a=nn.Sequential(nn.Linear(4, 4), ONE())),
        case("several in a module", lambda self, x: self.a(x), ["a.0#0", "a.0#1"], a=nn.Sequential(TWO())),
        case("at the root", lambda self, x: x + self.f(x), ["#0"]),
        case("root and module", lambda self, x: self.a(x) + self.f(self.a(x)), ["a#0", "a#1", "#0"], a=ONE()),
        case("a module called twice", lambda self, x: self.a(self.a(x)), ["a#0", "a#1"], a=ONE()),
        case("two twice", lambda self, x: self.a(self.a(x)), ["a#0", "a#1", "a#2", "a#3"], a=TWO()),
        case("kept ones count", lambda self, x: self.g(x) + self.f(x) + self.h(x), ["#0", "#1"]),
        case(
            "wrapped by its add",
            lambda self, x: torch.tanh(self.a(x)),
            ["a"],
            a=Part(lambda self, x: torch.relu(x + self.f(x))),
        ),
    ],
)
def test_blocks_are_named_by_the_module_that_runs_the_add(forward, names, parts):
    result = found(forward, parts)
    rows = sorted((*result.blocks, *result.rejections), key=lambda row: row.name)
    assert [row.name for row in rows] == sorted(names)
