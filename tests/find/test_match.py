"""Match: sums that are blocks, however they are written."""

from __future__ import annotations

import copy

import pytest
import torch
from graphs import X, case, found, net, only_block
from helpers import relative_error
from torch import nn

import mfx

P = nn.Parameter(torch.full((4,), 0.7))
MIXED = [
    case("scaled skip", lambda self, x: 0.7 * x + 0.3 * self.f(x)),
    case("skip divided", lambda self, x: x / 2 + self.f(x)),
    case("alpha on the skip", lambda self, x: torch.add(self.f(x), x, alpha=0.5)),
    case("alpha a buffer", lambda self, x: torch.add(x, self.f(x), alpha=self.b), b=torch.tensor(0.5)),
    case("skip scaled by a parameter", lambda self, x: x * self.p + self.f(x), p=P),
    case("skip scaled by what a parameter gives", lambda self, x: self.p.exp() * x + self.f(x), p=P),
    case("cast skip", lambda self, x: x.double() + self.f(x)),
    case("lerp", lambda self, x: torch.lerp(x, self.f(x), 0.3)),
    case("lerp from the branch", lambda self, x: torch.lerp(self.f(x), x, 0.3)),
    case("lerp by a parameter", lambda self, x: x.lerp(self.f(x), self.p), p=P),
    case("addcmul", lambda self, x: torch.addcmul(x, self.p, self.f(x), value=0.5), p=P),
    case("addcdiv", lambda self, x: x.addcdiv(self.f(x), self.p), p=P),
    case("addmm", lambda self, x: torch.addmm(x, self.f(x), self.f.weight, beta=0.5)),
    case("stack and sum", lambda self, x: torch.stack([x, self.f(x), self.g(x)]).sum(0)),
    case("stack and mean", lambda self, x: torch.stack((self.f(x), x), dim=-1).mean(dim=-1)),
    case("two branches", lambda self, x: x + self.f(x) + self.g(x)),
    case("two branches, one subtracted", lambda self, x: x + self.f(x) - self.g(x)),
    case("two branches, x in the middle", lambda self, x: self.f(x) + x + self.g(x)),
    case("two branches, x in brackets", lambda self, x: self.f(x) + (self.g(x) + x)),
    case("three branches", lambda self, x: x + self.f(x) + self.g(x) + self.h(x)),
    case("attention, then feed-forward of it", lambda self, x: x + (a := self.f(x)) + self.g(a)),
    case("branches scaled together", lambda self, x: 0.5 * (x + self.f(x)) + self.g(x)),
    case("with a position", lambda self, x: (x + self.p) + self.f(x), p=P),
]


@pytest.mark.parametrize(("forward", "parts"), MIXED)
def test_a_sum_of_other_terms_is_a_wrapped_block_from_x_to_all_of_it(forward, parts):
    block = only_block(forward, parts, X)
    assert block.kind == "wrapped"
    assert (block.skip.op, block.output.users.keys()) == ("placeholder", {block.output.next: None}.keys())


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        case("sum", lambda self, x: sum([x, self.f(x)])),
        case("sum, the branch first", lambda self, x: sum((self.f(x), x))),
        case("branches first", lambda self, x: self.f(x) + self.g(x) + x),
        case("branches in brackets", lambda self, x: x + (self.f(x) + self.g(x))),
        case("branch scaled", lambda self, x: x + 0.5 * self.f(x)),
    ],
)
def test_one_term_and_all_others_is_a_residual_block(forward, parts):
    block = only_block(forward, parts, X)
    assert (block.kind, block.skip.op) == ("residual", "placeholder")


def test_a_chain_of_blocks_under_a_scaled_skip_stays_the_chain():
    def forward(self, x):
        h = x
        for f in (self.f, self.g, self.h):
            h = h + f(h)
        return 0.5 * x + h

    rows = found(forward, {}, X)
    assert [row.name for row in rows.blocks] == ["#0", "#1", "#2", "#3"]
    assert mfx.report(net(forward), X).rewritable == ["#0", "#1", "#2"]


def test_a_skip_that_is_taken_away_again_is_none():
    assert [block.output.name for block in found(lambda self, x: (x + self.f(x)) - x, {}).blocks] == ["add"]


def test_a_long_sum_has_no_terms():
    def forward(self, x):
        total = x
        for _ in range(20):
            total = total + self.f(x)
        return total

    assert not [block for block in found(forward, {}, X).blocks if len(block.members) > 40]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize(("forward", "parts"), MIXED)
def test_a_chain_of_such_blocks_is_the_recurrence_written_by_hand(forward, parts, capture, gamma):
    torch.manual_seed(0)
    model = nn.Sequential(*(copy.deepcopy(net(forward, **parts)) for _ in range(3)))
    for number, parameter in enumerate(model.parameters()):
        parameter.data.add_(0.01 * number)
    mm = mfx.momentumize(copy.deepcopy(model), gamma, example_inputs=X, capture=capture)
    assert [len(chain.blocks) for chain in mfx.report(model, X, capture=capture).chains] == [3]

    def by_hand(x):
        v = torch.zeros_like(x)
        for block in model:
            v = gamma * v + (1 - gamma) * (block(x) - x)
            x = x + v
        return x

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    out, expected = mm(x), by_hand(y)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(out, expected) < 1e-12
    assert relative_error(x.grad, y.grad) < 1e-10
    for one, other in zip(mm.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or relative_error(one.grad, other.grad) < 1e-10
