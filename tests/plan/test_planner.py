"""Plan: which blocks form chains, at which level, and what keeps them apart."""

from __future__ import annotations

import pytest
import torch
from graphs import Part, X, case, net, prepared
from torch import nn

from mfx import OptionError, Reason


def planned(forward, parts=None, **options):
    return prepared(net(forward, **(parts or {})), **options).plan


def kept(plan):
    return [(row.name, row.reason) for row in plan.rejections]


def block(**parts):
    return Part(lambda self, x: x + self.f(x), **parts)


def blocks(count):
    return nn.Sequential(*(block() for _ in range(count)))


def three(self, x):
    x = x + self.f(x)
    x = x + self.g(x)
    return x + self.h(x)


def with_outer(inner, outer):
    """Outer blocks around ``inner`` blocks each."""

    def forward(self, x):
        for _ in range(outer):
            y = self.f(x)
            for _ in range(inner):
                y = y + self.g(y)
            x = x + self.h(y)
        return x

    return forward


def long_skip(self, x):
    y = x + self.f(x)
    y = y + self.g(y)
    return x + y


def apart(self, x):
    x = self.h(x + self.f(x))
    return x + self.g(x)


def side_by_side(self, x, z):
    x, z = x + self.f(x), z + self.g(z)
    return x + self.g(x), z + self.f(z)


@pytest.mark.parametrize(
    ("forward", "chains", "parts"),
    [
        case("consecutive blocks are one chain", three, [("#0", "#1", "#2")]),
        case("blocks with something between are two", apart, [("#0",), ("#1",)]),
        case("independent towers are two", side_by_side, [("#0", "#2"), ("#1", "#3")]),
        case("modules in a row are one", lambda self, x: self.b(x), [("b.0", "b.1")], b=blocks(2)),
        case(
            "a shared module is as many blocks as calls", lambda self, x: self.b(self.b(x)), [("b#0", "b#1")], b=block()
        ),
        case("of nested blocks the outer on a tie", with_outer(1, 1), [("#1",)]),
        case("of nested blocks the longer chain: outer", with_outer(1, 2), [("#1", "#3")]),
        case("of nested blocks the longer chain: inner", with_outer(3, 2), [("#0", "#1", "#2"), ("#4", "#5", "#6")]),
        case("a long skip gives way to what it spans", long_skip, [("#0", "#1")]),
    ],
)
def test_chains(forward, chains, parts):
    plan = planned(forward, parts)
    assert list(plan.names) == chains
    assert {row.reason for row in plan.rejections} <= {Reason.NESTED}


def test_a_nested_block_is_reported_with_the_block_that_is_kept():
    assert [(row.name, row.node) for row in planned(with_outer(1, 1)).rejections] == [("#0", "#1")]


def test_an_intermediate_state_read_elsewhere_is_a_tap_and_does_not_break_the_chain():
    def forward(self, x):
        first = x + self.f(x)
        second = first + self.g(first)
        return second + self.h(second), self.f(first), second

    (chain,) = planned(forward).chains
    assert chain.names == ("#0", "#1", "#2")
    assert [tap.name for tap in chain.taps] == ["add", "add_1"]


def test_what_all_states_share_is_no_tap():
    def forward(self, x):
        x = x + self.f(x)
        size, device = x.size(0), x.device
        return x + self.g(x), torch.zeros(size, device=device)

    (chain,) = planned(forward).chains
    assert chain.names == ("#0", "#1")
    assert not chain.taps


def test_a_side_made_from_the_size_of_a_state_does_not_break_the_chain():
    def forward(self, x):
        x = x + self.f(x)
        mask = torch.ones(x.size(0), 1)
        return x + self.g(x) * mask, mask

    assert [len(chain.blocks) for chain in planned(forward).chains] == [2]


def test_a_state_read_by_a_later_block_of_its_chain_is_a_side_of_that_block():
    def forward(self, x):
        first = x + self.f(x)
        second = first + self.g(first)
        return second + self.h(second) * first

    (chain,) = planned(forward).chains
    assert len(chain.blocks) == 3
    assert not chain.taps
    assert [side.name for side in chain.blocks[2].sides] == ["add"]


def test_an_escape_read_by_a_later_block_of_its_chain_does_not_break_the_chain():
    def forward(self, x):
        keys = self.f(x)
        x = x + self.g(keys)
        return x + self.h(x) * keys

    (chain,) = planned(forward).chains
    assert len(chain.blocks) == 2
    assert [node.name for node in chain.escapes] == ["f"]


def computed_from_a_state(self, x):
    x = x + self.f(x)
    gate = torch.sigmoid(self.h(x))
    x = x + self.g(x)
    x = x + self.g(x) * gate
    return x, gate


def random_between(self, x, z):
    x = x + self.d(self.f(x))
    z = self.d(z)
    return x + self.d(self.g(x)), z


def shared_statistics_between(self, x, z):
    x = x + self.n(self.f(x))
    z = self.n(z)
    return x + self.n(self.g(x)), z


def written_between(self, x, m):
    x = x + self.f(x) * m
    m.add_(1)
    return x + self.g(x) * m


def dropout_towers(self, x, z):
    x, z = x + self.d(self.f(x)), z + self.d(self.g(z))
    return x + self.d(self.g(x)), z + self.d(self.f(z))


@pytest.mark.parametrize(
    ("forward", "chains", "parts"),
    [
        case("a side computed outside from a state", computed_from_a_state, [("#0", "#1"), ("#2",)]),
        case("a draw between draws", random_between, [("#0",), ("#1",)], d=nn.Dropout()),
        case("statistics moved between", shared_statistics_between, [("#0",), ("#1",)], n=nn.BatchNorm1d(4)),
        case("a side written between", written_between, [("#0",), ("#1",)]),
        case("towers that take turns in drawing", dropout_towers, [("#0",), ("#1",), ("#2",), ("#3",)], d=nn.Dropout()),
    ],
)
def test_a_chain_ends_where_something_in_between_cannot_be_moved(forward, chains, parts):
    plan = planned(forward, parts)
    assert list(plan.names) == chains
    assert not plan.rejections


@pytest.mark.parametrize(
    ("forward", "chains", "parts"),
    [
        case("no draw in the second block", random_between, [("#0", "#1")], d=nn.Dropout(0.0)),
        case("no statistics", shared_statistics_between, [("#0", "#1")], n=nn.LayerNorm(4)),
        case("towers without draws", dropout_towers, [("#0", "#2"), ("#1", "#3")], d=nn.ReLU()),
    ],
)
def test_without_the_hazard_the_same_chains_hold_together(forward, chains, parts):
    assert list(planned(forward, parts).names) == chains


def draws_in_the_middle(self, x):
    y = self.d(self.f(x))
    noise = torch.rand_like(y)
    return x + self.d(self.g(y)), noise


def moves_statistics_in_the_middle(self, x, z):
    y = self.n(self.f(x))
    z = self.n(z)
    return x + self.n(self.g(y)), z


@pytest.mark.parametrize(
    ("forward", "node", "parts"),
    [
        case("a draw that depends on the block", draws_in_the_middle, "d_1", d=nn.Dropout()),
        case("another use of its batch norm", moves_statistics_in_the_middle, "n_1", n=nn.BatchNorm1d(4)),
    ],
)
def test_a_block_that_would_change_an_order_is_kept(forward, node, parts):
    plan = planned(forward, parts)
    assert not plan.chains
    assert kept(plan) == [("#0", Reason.ORDER)]
    assert plan.rejections[0].node.name == node


def test_the_write_of_a_block_that_is_kept_after_all_stands_in_the_way_of_others():
    def forward(self, x, z):
        m = self.g(x)
        z = z + (self.f(z) + m)
        z = z + self.h(z)
        y = self.d(self.f(m * 0.5))
        noise = torch.rand_like(y)
        m += self.d(self.g(y))
        return z + self.f(z), m, noise

    plan = planned(forward, {"d": nn.Dropout()})
    assert list(plan.names) == [("#0", "#1"), ("#3",)]
    assert kept(plan) == [("#2", Reason.ORDER)]


def test_of_chains_that_would_have_to_wait_for_each_other_one_is_split():
    def forward(self, x, z):
        z = z.float()
        x, z = x + self.f(x), z + self.g(z.double()).float()
        return x + self.f(x) * z, z + self.g(z.double()).float() * x.float()

    names = prepared(net(forward), (X, X)).plan.names
    assert sorted(names) == [("#0",), ("#1", "#3"), ("#2",)], "of different dtypes, so they are not one chain"


@pytest.mark.parametrize(
    ("options", "chains", "reason"),
    [
        ({"exclude": "b.1"}, [("b.0",), ("b.2", "b.3")], Reason.EXCLUDED),
        ({"exclude": ["b.0", "b.1"]}, [("b.2", "b.3")], Reason.EXCLUDED),
        ({"include": "b.[12]"}, [("b.1", "b.2")], Reason.EXCLUDED),
        ({"include": "b.*", "exclude": "b.3"}, [("b.0", "b.1", "b.2")], Reason.EXCLUDED),
        ({"gamma": {"b.[01]": 0.5}}, [("b.0", "b.1")], Reason.NO_GAMMA),
    ],
)
def test_what_the_caller_does_not_want_is_kept(options, chains, reason):
    plan = planned(lambda self, x: self.b(x), {"b": blocks(4)}, **options)
    assert list(plan.names) == chains
    assert {row.reason for row in plan.rejections} == {reason}
    assert len(plan.rejections) == 4 - sum(map(len, chains))


def test_excluding_an_outer_block_leaves_the_inner_one():
    plan = planned(with_outer(1, 1), exclude="#1")
    assert list(plan.names) == [("#0",)]


def test_the_first_pattern_that_matches_gives_gamma():
    (chain,) = planned(lambda self, x: self.b(x), {"b": blocks(3)}, gamma={"b.1": 0.5, "b.*": 0.25, "*": 0}).chains
    assert chain.gammas == (0.25, 0.5, 0.25)


def test_the_first_step_takes_the_whole_branch_where_velocity_is_first():
    (chain,) = planned(three, gamma=0.5, velocity="first").chains
    assert chain.gammas == (0.0, 0.5, 0.5)


@pytest.mark.parametrize("argument", ["include", "exclude", "modules", "gamma"])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_near_names(argument):
    value = {"b.9": 0.5} if argument == "gamma" else "b.9"
    with pytest.raises(OptionError, match=r"'b\.9' matches no (block|module).*b\.0"):
        planned(lambda self, x: self.b(x), {"b": blocks(3)}, **{argument: value})


def test_rejections_are_listed_in_order_of_execution():
    def forward(self, x):
        x = x + self.b(x)
        x = self.g(x) + self.f(x)
        return x + 0.1 * x**3

    assert kept(planned(forward, {"b": block()}, exclude="#0")) == [
        ("#0", Reason.EXCLUDED),
        ("#1", Reason.PROJECTION),
        ("#2", Reason.NO_PARAMETERS),
    ]
