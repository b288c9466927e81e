"""Largest: the largest size that fits, against asking for every size in turn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfx.budget.largest import largest


def counted(needs):
    asked = []

    def ask(size):
        asked.append(size)
        return needs(size)

    return ask, asked


@given(
    base=st.integers(0, 500),
    slope=st.integers(1, 40),
    bump=st.integers(0, 60),
    memory=st.integers(0, 3000),
    start=st.integers(1, 60),
    lowest=st.integers(1, 60),
    span=st.integers(0, 200),
)
def test_it_is_what_asking_for_each_size_finds(base, slope, bump, memory, start, lowest, span):
    """What grows with the size by steps, and is possible from a lowest to a highest size."""
    lowest = min(lowest, start)

    def needs(size):
        if not lowest <= size <= start + span:
            return None
        return base + slope * size + bump * (size // 8)

    ask, asked = counted(needs)
    found = largest(ask, memory, start)
    expected = max((size for size in range(lowest, start + span + 1) if needs(size) <= memory), default=0)
    assert found.size == expected
    assert len(set(asked)) == len(asked)
    assert asked[0] == start
    assert found.needs == {size: needs(size) for size in asked}
    if expected:
        assert {expected, expected + 1} <= set(asked)


@pytest.mark.parametrize("memory", [10**6, 10**9, 10**12])
def test_a_straight_line_takes_few_questions(memory):
    ask, asked = counted(lambda size: 12345 + 678 * size)
    assert largest(ask, memory, 8).size == (memory - 12345) // 678
    assert len(asked) <= 8


def test_what_is_no_line_takes_as_many_as_halving():
    ask, asked = counted(lambda size: math.exp(size / 1000))
    assert largest(ask, 10**20, 1).size == int(1000 * math.log(10**20))
    assert len(asked) < 40


def test_where_no_bytes_would_do_sizes_go_down():
    found = largest(lambda size: size if size < 10 else math.inf, 1000, 64)
    assert (found.size, found.needs[10]) == (9, math.inf)
    assert largest(lambda size: math.inf, 1000, 64).size == 0
