"""Find: blocks that take in what follows their add, and modules taken whole."""

from __future__ import annotations

import pytest
import torch
from graphs import Part, X, case, found, net, only_block, prepared
from helpers import assert_same, chain_names, run
from torch import Tensor, nn

import mfx
from mfx import Reason


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


def into_x(self, x):
    x += self.f(x)
    return self.r(x)


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("h after an add into x", lambda self, x: self.b(self.g(x)) * 2, b=Part(into_x, r=nn.ReLU())),
        case("h in place after an add into x", lambda self, x: self.b(self.g(x)) * 2, b=Part(into_x, r=nn.ReLU(True))),
    ],
)
def test_an_add_into_x_may_be_followed_by_operations_of_the_block(forward, parts):
    block = only_block(forward, parts)
    assert (block.kind, block.written) == ("wrapped", "skip")


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(True)])
def test_a_branch_value_read_before_x_is_added_into_it_is_handed_out_as_it_was(relu):
    def forward(self, x):
        value = self.f(x)
        total = value.sum()
        value += x
        return self.r(value), total

    model = net(lambda self, x: self.b(self.g(x)), b=Part(forward, r=relu))
    assert prepared(model).plan.names == (("b",),)
    assert_same(run(mfx.momentumize(model, gamma=0.0), X), run(model, X))


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


@pytest.mark.parametrize("index", [0, 1])
def test_an_item_of_the_last_value_is_taken_of_the_chains_result(index):
    """Only indexed from then on, the value is still x', not what the last branch computes."""

    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(x + layer(x))
            return x[index]

    model = Post()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    v, state = torch.zeros_like(x), x
    for layer in model.layers:
        v = 0.7 * v + 0.3 * (torch.relu(state + layer(state)) - state)
        state = state + v
    for given in ({}, {"example_inputs": x}, {"example_inputs": x, "capture": "dynamo"}):
        mm = mfx.momentumize(model, 0.7, **given)
        assert [len(chain) for chain in chain_names(mm)] == [3]
        assert torch.allclose(mm(x), state[index], atol=1e-12)
