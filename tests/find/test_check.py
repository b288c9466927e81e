"""Find: what is not a block, and why."""

from __future__ import annotations

import pytest
import torch
from graphs import X, case, found
from torch import nn

from mfx import Reason

OWN = torch.Generator()


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
        case("two branches", lambda self, x: self.f(x) + self.g(x), Reason.PROJECTION, "g"),
        case("f(x) - x", lambda self, x: self.f(x) - x, Reason.SUBTRACTED_SKIP, "sub"),
        case("skip taken negative", lambda self, x: torch.add(self.f(x), x, alpha=-0.5), Reason.SUBTRACTED_SKIP, "add"),
        case("negative multiple", lambda self, x: -0.5 * x + self.f(x), Reason.PROJECTION, "f"),
        case("scaled by an input", lambda self, x, a: x * a + self.f(x), Reason.PROJECTION, "mul"),
        case("gelu", lambda self, x: x + 0.044715 * x**3, Reason.NO_PARAMETERS, "mul"),
        case("x + x", lambda self, x: x + x, Reason.NO_PARAMETERS, "x"),
        case("scaled by a buffer", lambda self, x: x + x * self.b, Reason.NO_PARAMETERS, "mul", b=torch.ones(4)),
        case("relu_ on x", branch_relu_in_place, Reason.WRITES_SKIP, "relu_"),
        case("a view of x written", branch_writes_view, Reason.WRITES_SKIP, "mul_"),
        case(
            "the values of a jagged x written",
            lambda self, x: x + self.f(x.values().mul_(2)),
            Reason.WRITES_SKIP,
            "mul_",
        ),
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
        case("stack and sum over another dimension", lambda self, x: torch.stack([x, self.f(x)]).sum(1)),
        case("stack and largest", lambda self, x: torch.stack([x, self.f(x)]).amax(0)),
        case("lerp by a gate", lambda self, x: torch.lerp(x, self.f(x), self.g(x).sigmoid())),
        case("addcmul of an input", lambda self, x, y: torch.addcmul(y, x, self.f(x))),
        case("addmm of a bias", lambda self, x: torch.addmm(self.f.bias, x, self.f.weight)),
        case("numbers", lambda self, x: self.f(x).view(x.size(0) + x.size(0), -1)),
        case("no add at all", lambda self, x: self.g(torch.relu(self.f(x)))),
    ],
)
def test_adds_of_values_that_have_nothing_in_common_are_not_even_listed(forward, parts):
    result = found(forward, parts)
    assert not result.blocks
    assert not result.rejections


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("highway", lambda self, x: (g := self.g(x)) * x + (1 - g) * self.f(x)),
        case("rotary embedding", lambda self, x: x * 2 + (x * 2).flip(-1)),
        case("modulation", lambda self, x: (c := self.f(x).chunk(2, -1))[0] * self.g(x).mean() + c[1]),
        case(
            "mixed by parameters alone",
            lambda self, x: x * self.p + x.roll(1, 0) * (1 - self.p),
            p=nn.Parameter(torch.ones(4)),
        ),
    ],
)
def test_sums_without_a_layer_since_their_values_parted_are_no_residual_adds(forward, parts):
    """They have names of their own, which move no block's name."""
    result = found(lambda self, x: forward(self, x).sum() + (x + self.h(x)), parts)
    assert [(row.name, row.reason) for row in result.sums][:1] == [("~0", Reason.PROJECTION)]
    assert [block.name for block in result.blocks] == ["#0"]


def test_an_add_that_broadcasts_is_kept_where_shapes_are_known():
    def forward(self, x):
        return x + self.f(x).mean(0)

    (row,) = found(forward, {}, X).rejections
    assert (row.reason, row.node.name) == (Reason.BROADCAST, "mean")
    assert "mean" in row.text
