"""What mfx knows of single operations, on graphs built by hand."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from mfx.graph import operations
from mfx.graph.notes import DTYPE_KEPT
from mfx.graph.resources import aliased, writes
from mfx.graph.splice import is_pure
from mfx.graph.sums import add_form

ROOT = nn.ModuleDict(
    {
        "identity": nn.Identity(),
        "dropout": nn.Dropout(0.1),
        "no_dropout": nn.Dropout(0.0),
        "relu": nn.ReLU(),
        "relu_in_place": nn.ReLU(inplace=True),
        "norm": nn.LayerNorm(4),
        "batch_norm": nn.BatchNorm1d(4),
        "linear": nn.Linear(4, 4),
        "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
        "attention_without_dropout": nn.MultiheadAttention(4, 2),
        "glu": nn.GLU(),
        "sequence": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)),
    }
)


class Calls:
    """Makes single nodes that read ``x`` and ``y``."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.y = self.graph.placeholder("y")

    def function(self, target, *args, **kwargs):
        return self.graph.call_function(target, args, kwargs)

    def method(self, name, *args, **kwargs):
        return self.graph.call_method(name, args, kwargs)

    def module(self, name):
        return self.graph.call_module(name, (self.x,))


@pytest.fixture
def c() -> Calls:
    return Calls()


@pytest.mark.parametrize(
    ("make", "scale", "written"),
    [
        (lambda c: c.function(operator.add, c.x, c.y), 1, None),
        (lambda c: c.function(operator.iadd, c.x, c.y), 1, "x"),
        (lambda c: c.function(torch.add, c.x, c.y), 1, None),
        (lambda c: c.function(torch.add, c.x, c.y, alpha=0.5), 0.5, None),
        (lambda c: c.function(torch.add, input=c.x, other=c.y), 1, None),
        (lambda c: c.function(torch.add, c.x, other=c.y), 1, None),
        (lambda c: c.method("add", c.x, c.y), 1, None),
        (lambda c: c.method("add_", c.x, c.y, alpha=2), 2, "x"),
        (lambda c: c.function(operator.sub, c.x, c.y), -1, None),
        (lambda c: c.function(operator.isub, c.x, c.y), -1, "x"),
        (lambda c: c.function(torch.sub, c.x, c.y, alpha=0.5), -0.5, None),
        (lambda c: c.function(torch.subtract, c.x, c.y), -1, None),
        (lambda c: c.method("sub_", c.x, c.y), -1, "x"),
        (lambda c: c.function(torch.ops.aten.add.Tensor, c.x, c.y), 1, None),
        (lambda c: c.function(torch.ops.aten.add_.Tensor, c.x, c.y), 1, "x"),
        (lambda c: c.function(torch.ops.aten.sub.Tensor, c.x, c.y, alpha=3), -3, None),
    ],
)
def test_every_way_to_write_an_add_is_one(c, make, scale, written):
    form = add_form(make(c))
    assert form is not None
    assert (form.left, form.right, form.scale) == (c.x, c.y, scale)
    assert form.written is (c.x if written else None)


def test_an_add_scaled_by_a_value_of_the_graph_has_that_value_as_its_scale(c):
    assert add_form(c.function(torch.add, c.x, c.y, alpha=c.y)).scale is c.y


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.function(operator.add, c.x, 1),
        lambda c: c.function(operator.add, 1.0, c.x),
        lambda c: c.function(torch.add, c.x, c.y, out=c.y),
        lambda c: c.function(operator.mul, c.x, c.y),
        lambda c: c.function(torch.addmm, c.x, c.y, c.y),
        lambda c: c.function(torch.cat, [c.x, c.y]),
        lambda c: c.method("addcmul", c.x, c.y, c.y),
        lambda c: c.method("index_add_", c.x, 0, c.y, c.y),
        lambda c: c.module("linear"),
    ],
)
def test_other_operations_are_no_adds(c, make):
    assert add_form(make(c)) is None


def test_a_function_of_the_users_own_named_add_is_no_add(c):
    def add(x, y):
        return x * y

    assert add_form(c.function(add, c.x, c.y)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.module("identity"),
        lambda c: c.module("no_dropout"),
        lambda c: c.method("contiguous", c.x),
        lambda c: c.method("clone", c.x),
        lambda c: c.function(F.dropout, c.x, 0.0),
        lambda c: c.function(F.dropout, c.x, p=0.0, training=True),
    ],
)
def test_operations_that_do_nothing_are_seen_through(c, make):
    assert operations.is_noop(make(c), ROOT)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c.module("dropout"),
        lambda c: c.module("relu"),
        lambda c: c.function(F.dropout, c.x),
        lambda c: c.function(F.dropout, c.x, 0.5, False),
        lambda c: c.method("detach", c.x),
        lambda c: c.method("to", c.x, torch.float32),
        lambda c: c.method("view", c.x, -1),
    ],
)
def test_operations_that_may_do_something_are_not_seen_through(c, make):
    assert not operations.is_noop(make(c), ROOT)


def test_a_cast_does_nothing_where_shapes_were_propagated_and_the_dtype_stayed(c):
    cast = c.method("to", c.x, torch.float64)
    cast.meta[DTYPE_KEPT] = True
    assert operations.is_noop(cast, ROOT)


@pytest.mark.parametrize(
    ("make", "written"),
    [
        (lambda c: c.module("relu_in_place"), "x"),
        (lambda c: c.module("relu"), ""),
        (lambda c: c.function(F.relu, c.x, inplace=True), "x"),
        (lambda c: c.function(F.relu, c.x, True), "x"),
        (lambda c: c.function(F.relu, c.x, False), ""),
        (lambda c: c.function(F.dropout, c.x, 0.5, True, True), "x"),
        (lambda c: c.method("relu_", c.x), "x"),
        (lambda c: c.function(torch.relu_, c.x), "x"),
        (lambda c: c.method("__and__", c.x, c.y), ""),
        (lambda c: c.function(operator.imul, c.x, c.y), "x"),
        (lambda c: c.function(operator.setitem, c.x, 0, c.y), "x"),
        (lambda c: c.function(torch.mul, c.x, 2, out=c.y), "y"),
        (lambda c: c.method("copy_", c.x, c.y), "x"),
        (lambda c: c.function(F.batch_norm, c.x, c.y, c.y, training=True), "y"),
        (lambda c: c.function(F.batch_norm, c.x, c.y, c.y, training=False), ""),
        (lambda c: c.function(F.batch_norm, c.x, None, None, training=True), ""),
    ],
)
def test_writes_name_the_inputs_that_change(c, make, written):
    assert {node.name for node in writes(make(c), ROOT)} == set(written)


@pytest.mark.parametrize(
    ("make", "shared"),
    [
        (lambda c: c.method("view", c.x, -1), "x"),
        (lambda c: c.method("add_", c.x, c.y), "x"),
        (lambda c: c.module("relu_in_place"), "x"),
        (lambda c: c.module("dropout"), "x"),
        (lambda c: c.function(torch.mul, c.x, 2, out=c.y), "y"),
        (lambda c: c.function(operator.add, c.x, c.y), None),
        (lambda c: c.module("linear"), None),
        (lambda c: c.method("clone", c.x), None),
        (lambda c: c.method("size", c.x), None),
        (lambda c: c.function(F.batch_norm, c.x, c.y, c.y, training=True), None),
    ],
)
def test_a_value_shares_memory_with_what_it_views_or_was_written_into(c, make, shared):
    found = aliased(make(c), ROOT)
    assert (found.name if found else None) == shared


@pytest.mark.parametrize(
    ("make", "random"),
    [
        (lambda c: c.module("dropout"), True),
        (lambda c: c.module("no_dropout"), False),
        (lambda c: c.module("sequence"), True),
        (lambda c: c.module("attention"), True),
        (lambda c: c.module("attention_without_dropout"), False),
        (lambda c: c.module("linear"), False),
        (lambda c: c.function(F.dropout, c.x), True),
        (lambda c: c.method("bernoulli_", c.x), True),
        (lambda c: c.function(torch.rand_like, c.x), True),
        (lambda c: c.function(torch.ops.aten.native_dropout.default, c.x, 0.1, True), True),
        (lambda c: c.function(F.scaled_dot_product_attention, c.x, c.x, c.x), False),
        (lambda c: c.function(F.scaled_dot_product_attention, c.x, c.x, c.x, dropout_p=0.1), True),
        (lambda c: c.function(F.relu, c.x), False),
    ],
)
def test_draws_of_random_numbers_are_known(c, make, random):
    assert operations.is_random(make(c), ROOT) is random


def test_a_function_that_nobody_knows_may_draw_and_may_look_at_the_grad_mode(c):
    unknown = c.function(lambda x: x, c.x)
    assert operations.is_random(unknown, ROOT)
    assert operations.sees_grad_mode(unknown, ROOT)


@pytest.mark.parametrize("name", ["shape", "dtype", "device", "ndim", "requires_grad"])
def test_attributes_other_than_tensors_are_queries(c, name):
    assert operations.is_query(c.function(getattr, c.x, name))


@pytest.mark.parametrize("name", ["T", "mT", "data", "real"])
def test_attributes_that_are_tensors_are_no_queries(c, name):
    assert not operations.is_query(c.function(getattr, c.x, name))


def test_only_queries_whose_answer_all_states_share_are_shape_queries(c):
    assert operations.is_shape_query(c.method("size", c.x, 0))
    assert operations.is_shape_query(c.function(getattr, c.x, "device"))
    assert not operations.is_shape_query(c.function(getattr, c.x, "dtype"))
    assert not operations.is_shape_query(c.function(getattr, c.x, "requires_grad"))


@pytest.mark.parametrize(
    ("make", "keeps"),
    [
        (lambda c: c.module("relu"), True),
        (lambda c: c.module("norm"), True),
        (lambda c: c.module("batch_norm"), True),
        (lambda c: c.module("dropout"), True),
        (lambda c: c.function(F.gelu, c.x), True),
        (lambda c: c.function(operator.mul, c.x, 2), True),
        (lambda c: c.function(operator.mul, c.x, c.y), False),
        (lambda c: c.function(torch.mul, c.x, other=c.y), False),
        (lambda c: c.module("linear"), False),
        (lambda c: c.module("glu"), False),
        (lambda c: c.module("attention"), False),
        (lambda c: c.function(torch.mean, c.x, 0), False),
    ],
)
def test_only_operations_known_to_keep_the_shape_do(c, make, keeps):
    assert operations.keeps_shape(make(c), ROOT) is keeps


@pytest.mark.parametrize(
    ("make", "pure"),
    [
        (lambda c: c.graph.get_attr("linear.weight"), True),
        (lambda c: c.function(torch.mul, c.x, 2), True),
        (lambda c: c.method("size", c.x), True),
        (lambda c: c.method("add_", c.x, c.y), False),
        (lambda c: c.function(F.dropout, c.x), False),
        (lambda c: c.function(torch._assert, c.x, "message"), False),
        (lambda c: c.module("linear"), False),
        (lambda c: c.function(lambda x: x, c.x), False),
    ],
)
def test_only_values_without_effect_may_be_left_out(c, make, pure):
    assert is_pure(make(c), ROOT) is pure
