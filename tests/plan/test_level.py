"""Level: which of blocks inside one another are taken."""

from __future__ import annotations

import pytest
from graphs import Part, prepared
from torch import nn

BLOCK = lambda: Part(lambda self, x: x + self.f(x))  # noqa: E731


def group(inner, around):
    """``inner`` blocks, a layer after them, and a skip around all."""
    body = nn.Sequential(*(BLOCK() for _ in range(inner)))
    return Part(lambda self, x: around(x, self.f(self.body_(x))), body_=body)


def plain(x, y):
    return x + y


def scaled(x, y):
    return 0.5 * x + y


@pytest.mark.parametrize("around", [plain, scaled])
@pytest.mark.parametrize("inner", [(6, 6, 6), (3, 3, 3, 3, 3), (4, 4, 4, 4), (2, 6, 2, 6), (1, 1, 1)])
def test_of_groups_with_long_skips_all_are_taken_whole_or_all_inside(inner, around):
    model = nn.Sequential(*(group(count, around) for count in inner)).double()
    whole = max(inner) <= len(inner)
    expected = (
        [tuple(map(str, range(len(inner))))]
        if whole
        else [
            tuple(f"{g}.body_.{b}" for b in range(count)) if count > 1 else (str(g),) for g, count in enumerate(inner)
        ]
    )
    assert list(prepared(model).plan.names) == expected


def test_blocks_before_and_after_a_long_skip_go_on_with_those_inside_of_it():
    first, last = (nn.Sequential(*(BLOCK() for _ in range(2))) for _ in range(2))
    body = nn.Sequential(*(BLOCK() for _ in range(6)))
    model = nn.Sequential(first, Part(lambda self, x: x + self.f(self.body_(x)), body_=body), last).double()
    inside = tuple(f"1.body_.{number}" for number in range(6))
    assert list(prepared(model).plan.names) == [("0.0", "0.1", *inside), ("2.0", "2.1")]
