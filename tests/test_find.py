"""Find: what is a residual block, what is not, and why."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from helpers import Part, net, prepared
from torch import nn

from mfx import Reason

X = torch.ones(2, 4, dtype=torch.float64)
OWN = torch.Generator()


def case(meaning, forward, *expected, **parts):
    return pytest.param(forward, *expected, parts, id=meaning)


def found(forward, parts, example=None, **options):
    return prepared(net(forward, **parts), example, **options).found


def only_block(forward, parts, example=None, **options):
    result = found(forward, parts, example, **options)
    assert not result.rejections
    (block,) = result.blocks
    return block


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


def old_name(self, x):
    x = self.g(x)
    old = x.view(-1)
    x += self.f(x)
    return x, old


def branch_relu_in_place(self, x):
    x = self.g(x)
    return x + self.f(x.relu_())


def branch_writes_view(self, x):
    x = self.g(x)
    return x + self.f(x.view(-1, 4).mul_(2))


def side_in_place(self, x, m):
    return x + self.f(x) * m.add_(1)


def escape_overwritten(self, x):
    a = self.f(x)
    b = self.g(a)
    a.relu_()
    return x + b, a


@pytest.mark.parametrize(
    ("forward", "reason", "node", "parts"),
    [
        case("projection", lambda self, x: self.g(x) + self.f(torch.relu(x)), Reason.PROJECTION, "g"),
        case(
            "skip through a dropout",
            lambda self, x: self.d(x) + self.f(self.h(x)),
            Reason.PROJECTION,
            "d",
            d=nn.Dropout(),
        ),
        case("cast to an unknown dtype", lambda self, x: x.float() + self.f(self.h(x)), Reason.PROJECTION, "float_1"),
        case("two branches", lambda self, x: self.f(x) + self.g(x), Reason.PROJECTION, "g"),
        case("scaled skip", lambda self, x: torch.add(self.f(x), x, alpha=0.5), Reason.SCALED_SKIP, "add"),
        case("f(x) - x", lambda self, x: self.f(x) - x, Reason.SCALED_SKIP, "sub"),
        case("alpha from an input", lambda self, x, a: torch.add(x, self.f(x), alpha=a), Reason.SCALED_SKIP, "add"),
        case("gelu", lambda self, x: x + 0.044715 * x**3, Reason.NO_PARAMETERS, "mul"),
        case("x + x", lambda self, x: x + x, Reason.NO_PARAMETERS, "x"),
        case("rotary embedding", lambda self, x: x * 2 + (x * 2).flip(-1), Reason.PROJECTION, "mul"),
        case("scaled by a buffer", lambda self, x: x + x * self.b, Reason.NO_PARAMETERS, "mul", b=torch.ones(4)),
        case("relu_ on x", branch_relu_in_place, Reason.WRITES_SKIP, "relu_"),
        case("a view of x written", branch_writes_view, Reason.WRITES_SKIP, "mul_"),
        case("relu in place module", lambda self, x: x + self.f(self.r(x)), Reason.WRITES_SKIP, "r", r=nn.ReLU(True)),
        case("x += f(x) with the old x read later", old_name, Reason.READS_OVERWRITTEN, "output"),
        case("escape overwritten", escape_overwritten, Reason.READS_OVERWRITTEN, "relu_"),
        case("into the input", lambda self, x: x.add_(self.f(x)), Reason.WRITES_INPUT, "add_"),
        case(
            "into the input by another name",
            lambda self, x: self.i(x).add_(self.f(x)),
            Reason.WRITES_INPUT,
            "add_",
            i=nn.Identity(),
        ),
        case("into a side input", side_in_place, Reason.WRITES_OUTSIDE, "add_"),
        case(
            "generator of its own",
            lambda self, x: x + self.f(x) * torch.rand(4, generator=OWN),
            Reason.OWN_GENERATOR,
            "rand",
        ),
    ],
)
def test_what_is_a_residual_add_but_no_block_is_kept_with_reason_and_node(forward, reason, node, parts):
    result = found(forward, parts)
    assert not result.blocks
    assert [(row.name, row.reason) for row in result.rejections] == [("#0", reason)]
    assert result.rejections[0].node.name == node


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("a constant", lambda self, x: self.f(x) + 1),
        case("a constant tensor", lambda self, x: x + torch.ones(4)),
        case("a positional embedding", lambda self, x: x + self.p, p=nn.Parameter(torch.ones(4))),
        case("a buffer", lambda self, x: x + self.b, b=torch.ones(4)),
        case("an embedding of positions", lambda self, x: x + self.e(torch.arange(x.shape[0])), e=nn.Embedding(9, 4)),
        case("two inputs", lambda self, x, y: self.f(x) + self.g(y)),
        case("an input and a branch of another", lambda self, x, y: x + self.g(y)),
        case("concatenation", lambda self, x: torch.cat([x, self.f(x)])),
        case("gate", lambda self, x: x * self.f(x)),
        case("stack and sum", lambda self, x: torch.stack([x, self.f(x)]).sum(0)),
        case("lerp", lambda self, x: torch.lerp(x, self.f(x), 0.5)),
        case("numbers", lambda self, x: self.f(x).view(x.size(0) + x.size(0), -1)),
        case("no add at all", lambda self, x: self.g(torch.relu(self.f(x)))),
    ],
)
def test_adds_of_values_that_have_nothing_in_common_are_not_even_listed(forward, parts):
    result = found(forward, parts)
    assert not result.blocks and not result.rejections


def test_an_add_that_broadcasts_is_kept_where_shapes_are_known():
    def forward(self, x):
        return x + self.f(x).mean(0)

    (row,) = found(forward, {}, X).rejections
    assert (row.reason, row.node.name) == (Reason.BROADCAST, "mean")
    assert "mean" in row.text


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
    assert not block.escapes and not block.sides
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
    assert "exp" in [node.name for node in block.members] and not block.sides


def repeated(self, x):
    x = torch.relu(x + self.f(x))
    return self.h(torch.relu(x + self.g(x))) * 2


def followed(self, x):
    x = torch.relu(x + self.f(x))
    return x + self.g(x)


def post_norm(self, x):
    return self.n(x + self.f(x))


def scaled_after(self, x):
    return (x + self.f(x)) * self.f.bias


WRAPPED = Part(lambda self, x: torch.relu(x + self.f(x)))


@pytest.mark.parametrize(
    ("forward", "kinds", "parts"),
    [
        case("(a) the next skip starts after h", followed, ["wrapped", "residual"]),
        case("(b) h ends what the module returns", lambda self, x: self.b(x) * 2, ["wrapped"], b=WRAPPED),
        case("(b) post-norm", lambda self, x: self.b(x) * 2, ["wrapped"], b=Part(post_norm, n=nn.LayerNorm(4))),
        case("(c) h repeats the h before", repeated, ["wrapped", "wrapped"]),
    ],
)
def test_operations_after_the_add_make_a_wrapped_block(forward, kinds, parts):
    assert [block.kind for block in found(forward, parts).blocks] == kinds


def read_between(self, x):
    y = x + self.f(x)
    z = torch.relu(y)
    return z + self.g(z), y


def depends_on_x(self, x):
    y = (x + self.f(x)) * torch.sigmoid(x)
    return y + self.g(y)


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("the root's own last operation", lambda self, x: torch.relu(x + self.f(x))),
        case("another consumer between", read_between),
        case("an h that depends on x", depends_on_x),
        case("an h of unknown shape", lambda self, x: self.b(x), b=Part(lambda self, x: self.h(x + self.f(x)))),
        case("an h that broadcasts, perhaps", lambda self, x: self.b(x), b=Part(scaled_after)),
    ],
)
def test_operations_that_do_not_belong_to_the_block_stay_outside(forward, parts):
    assert {block.kind for block in found(forward, parts).blocks} == {"residual"}


def test_known_shapes_let_any_shape_keeping_operation_into_a_wrapped_block():
    assert only_block(lambda self, x: self.b(x), {"b": Part(scaled_after)}, X).kind == "wrapped"
    assert (
        found(lambda self, x: self.b(x), {"b": Part(lambda self, x: (x + self.f(x)).mean())}, X).blocks[0].kind
        == "residual"
    )


def test_a_module_that_the_caller_names_is_a_block_as_a_whole():
    block = only_block(lambda self, x: self.b(x), {"b": nn.Sequential(nn.Linear(4, 4), nn.ReLU())}, modules="b")
    assert (block.kind, block.name, len(block.members)) == ("wrapped", "b", 1)


def test_a_named_module_that_changes_the_shape_is_kept():
    (row,) = found(lambda self, x: self.b(x), {"b": nn.Linear(4, 3)}, X, modules="b").rejections
    assert (row.name, row.reason) == ("b", Reason.BROADCAST)


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
        case("wrapped by its add", lambda self, x: torch.tanh(self.a(x)), ["a"], a=WRAPPED),
    ],
)
def test_blocks_are_named_by_the_module_that_runs_the_add(forward, names, parts):
    result = found(forward, parts)
    rows = sorted((*result.blocks, *result.rejections), key=lambda row: row.name)
    assert [row.name for row in rows] == sorted(names)
