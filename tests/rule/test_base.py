"""The contract of every rule, held by momentum and by rules of the tests' own: a new rule is one class and no more."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from helpers import relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mfx.errors import OptionError
from mfx.rule import Leapfrog, Midpoint, Momentum, Rule, StepSpec, schedule
from mfx.rule.arithmetic.carry import carry
from mfx.rule.step import added, advance, cotangents, retreat
from mfx.run import ChainSpec, run

F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Damped(Rule):
    """A rule of the tests' own: the midpoint rule, damped in another way."""

    @property
    def decay(self) -> float:
        return -0.8

    @property
    def pull(self) -> float:
        return 1.5


RULES = [
    Momentum(0.9),
    Momentum(0.3),
    Momentum(1.0),
    Momentum(-0.5),
    Momentum(-1.0),
    Midpoint(),
    Leapfrog(0.4),
    Damped(),
]
EVERY = pytest.mark.parametrize("rule", RULES, ids=str)


def values(*shape: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape or (3, 5), dtype=F64, requires_grad=True) for _ in range(3))


def step_of(rule: Rule, *, wrapped: bool = False, scale: float = 1.0) -> StepSpec:
    return StepSpec("b", None, None, rule, wrapped, scale, "", (), (), (), (), (), False, False)  # type: ignore


@EVERY
def test_retreat_undoes_advance(rule: Rule) -> None:
    x, v, branch = values()
    x_after, v_after = rule.advance(x, v, branch)
    torch.testing.assert_close(rule.x_before(x_after, v_after), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(rule.retreat(v_after, branch), v, rtol=0, atol=1e-13)


@EVERY
def test_advance_is_two_numbers(rule: Rule) -> None:
    x, v, branch = values()
    x_after, v_after = rule.advance(x, v, branch)
    torch.testing.assert_close(v_after, rule.decay * v + rule.pull * branch)
    torch.testing.assert_close(x_after, x + v_after)
    first_x, first_v = rule.advance(x, None, branch)
    assert torch.equal(first_v, rule.pull * branch)
    assert torch.equal(first_x, x + first_v)


@EVERY
def test_a_chain_that_starts_with_its_first_branch_acts_like_the_plain_block_there(rule: Rule) -> None:
    x, _, branch = values()
    x_after, v_after = rule.starting.advance(x, None, branch)
    torch.testing.assert_close(x_after, x + branch)
    torch.testing.assert_close(v_after, branch)


@pytest.mark.parametrize("grads", list(itertools.product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize(("wrapped", "scale"), [(False, 1.0), (False, -0.5), (True, 1.0)])
@pytest.mark.parametrize("rule", [*RULES, Momentum(0.0)], ids=str)
def test_cotangents_are_those_of_autograd(rule: Rule, wrapped: bool, scale: float, grads: tuple[bool, bool]) -> None:
    x, v, value = values()
    outputs = advance(step_of(rule, wrapped=wrapped, scale=scale), x, v, value)
    given = [torch.randn_like(out) if wanted else None for out, wanted in zip(outputs, grads, strict=True)]
    pairs = [(out, grad) for out, grad in zip(outputs, given, strict=True) if grad is not None and out.requires_grad]
    expected = (None, None, None)
    if pairs:
        ends, starts = zip(*pairs, strict=True)
        expected = torch.autograd.grad(ends, (x, v, value), starts, allow_unused=True)
    for got, wanted in zip(cotangents(step_of(rule, wrapped=wrapped, scale=scale), *given), expected, strict=True):
        zero = torch.zeros_like(x)
        torch.testing.assert_close(zero if got is None else got, zero if wanted is None else wanted)


@EVERY
def test_growth_bounds_an_error_that_is_carried_back(rule: Rule) -> None:
    """Power iteration on the map that a linear branch F(x) = slope x makes of an error."""
    for slope in (1.0, -1.0, 0.0):
        error = torch.tensor([1.0, 0.3], dtype=F64)
        sizes = []
        for _ in range(400):
            e_x = error[0] - error[1]
            error = torch.stack([e_x, (error[1] - rule.pull * slope * e_x) / rule.decay])
            sizes.append(float(error.norm()))
            error = error / error.norm()
        measured = math.exp(sum(map(math.log, sizes[100:])) / len(sizes[100:]))
        assert measured <= rule.growth(abs(slope)) * (1 + 1e-2), slope


@given(st.floats(0.01, 1.0), st.floats(0.0, 3.0))
def test_growth_of_momentum_is_its_formula(gamma: float, gain: float) -> None:
    trace = 1 + (1 + (1 - gamma) * gain) / gamma
    formula = (trace + math.sqrt(max(trace * trace - 4 / gamma, 0.0))) / 2
    assert Momentum(gamma).growth(gain) == pytest.approx(max(formula, math.sqrt(1 / gamma)), rel=1e-9)


def test_a_rule_is_a_value() -> None:
    assert Momentum(0.5) == Momentum(0.5)
    assert len({Momentum(0.5), Momentum(0.5), Midpoint(), Leapfrog(0.1)}) == 3
    assert [rule.plain for rule in (Momentum(0.0), Momentum(0.5), Midpoint())] == [True, False, False]


class Stack(nn.Module):
    """Branches of a chain, and their step specifications."""

    def __init__(self, depth: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, dtype=dtype) for _ in range(depth))

    def chain(self, rule: Rule, *, reversible: bool = True) -> ChainSpec:
        def branch(index: int, root: Stack, x: Tensor) -> tuple[Tensor]:
            return (0.1 * torch.tanh(root.layers[index](x)),)

        steps = []
        for index in range(len(self.layers)):
            names = tuple(((f"layers.{index}", name),) for name in ("weight", "bias"))
            f = partial(branch, index)
            steps.append(replace(step_of(rule), name=f"{index}", branch=f, again=f, parameters=names))
        planned = partial(schedule, tuple(step.rule for step in steps))
        return ChainSpec(
            "chain",
            tuple(steps),
            lambda dtype, compute, **device: planned(dtype, "auto", 1e-12, compute, **device),
            reversible=reversible,
        )

    def run(self, rule: Rule, x: Tensor, *, reversible: bool = True) -> Tensor:
        operands = [tuple(layer.parameters()) for layer in self.layers]
        return run(self.chain(rule, reversible=reversible), self, x, None, *operands)[0]

    def by_hand(self, rule: Rule, x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for layer in self.layers:
            v = rule.decay * v + rule.pull * 0.1 * torch.tanh(layer(x))
            x = x + v
        return x


@EVERY
def test_z_is_where_x_comes_to_rest_without_further_branches(rule: Rule) -> None:
    x, v, branch = values()
    x, v, branch = x.detach(), v.detach(), branch.detach()
    if rule.decay == 1:
        assert rule.coast is None
        return
    coast = rule.coast
    assert coast is not None
    after_x, after_v = rule.advance(x, v, branch)
    moved = rule.pull / (1 - rule.decay) * branch
    torch.testing.assert_close(after_x + coast * after_v, x + coast * v + moved)
    if abs(rule.decay) < 1:
        rest, still = x, v
        for _ in range(2000):
            still = rule.decay * still
            rest = rest + still
        torch.testing.assert_close(rest, x + coast * v)


def test_midpoint_and_leapfrog_are_their_two_step_forms() -> None:
    """x_{k+1} = x_{k-1} + 2 F(x_k), and x_{k+1} = 2 x_k - x_{k-1} + h^2 F(x_k)."""
    before, now, branch = values()
    torch.testing.assert_close(Midpoint().advance(now, now - before, branch)[0], before + 2 * branch)
    after = Leapfrog(0.3).advance(now, now - before, branch)[0]
    torch.testing.assert_close(after, 2 * now - before + 0.09 * branch)


@pytest.mark.parametrize("h", [0.0, -0.5, math.nan, math.inf, True, "1"])
def test_a_step_that_is_no_positive_number_is_refused(h: object) -> None:
    with pytest.raises(OptionError, match=r"h=.*above 0"):
        Leapfrog(h)  # type: ignore[arg-type]


@EVERY
@pytest.mark.parametrize("depth", [1, 12])
def test_a_chain_of_any_rule_has_the_gradients_of_the_recurrence_by_hand(rule: Rule, depth: int) -> None:
    stack, x = Stack(depth, F64), torch.randn(4, 6, dtype=F64, requires_grad=True)
    wanted = [x, *stack.parameters()]
    expected = torch.autograd.grad(stack.by_hand(rule, x).square().sum(), wanted, allow_unused=True)
    for reversible in (True, False):
        y = stack.run(rule, x, reversible=reversible)
        assert relative_error(y, stack.by_hand(rule, x)) < 1e-10
        found = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
        for got, right in zip(found, expected, strict=True):
            assert relative_error([got], [right]) < 1e-9


@pytest.mark.parametrize("rule", [Midpoint(), Leapfrog(0.2), Momentum(1.0)], ids=str)
def test_where_undoing_divides_by_one_exact_arithmetic_needs_no_snapshot(rule: Rule) -> None:
    planned = schedule((rule,) * 200, F32, F64)
    assert planned.exact
    assert planned.snapshots == ()
    assert planned.state_count(200) == 2


@pytest.mark.parametrize("rule", [Momentum(0.9), Midpoint(), Leapfrog(0.4)], ids=str)
def test_exact_arithmetic_is_undone_bit_for_bit(rule: Rule) -> None:
    depth = 40
    steps = tuple(step_of(rule) for _ in range(depth))
    planned = schedule((rule,) * depth, F32, F64)
    assert planned.exact
    arithmetic = carry(steps, planned)
    layers = [nn.Linear(6, 6) for _ in range(depth)]
    x: Tensor = torch.randn(64, 6).double()
    v: Tensor | None = None
    states = []
    with torch.no_grad():
        for index, layer in enumerate(layers):
            x, v = arithmetic.enter(index, x, v)
            states.append((x, v))
            x, v = arithmetic.advance(index, x, v, 0.1 * torch.tanh(layer(x.float())))
        assert v is not None
        for index in reversed(range(depth)):
            if index in planned.snapshots:
                return
            x = arithmetic.x_before(index, x, v)
            assert torch.equal(x, states[index][0]), index
            if index:
                v = arithmetic.v_before(index, x, v, 0.1 * torch.tanh(layers[index](x.float())))
                assert torch.equal(v, states[index][1]), index


@pytest.mark.parametrize("rule", [Momentum(0.9), Momentum(-0.6), Midpoint(), Leapfrog(0.4)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F64), (torch.bfloat16, F32)], ids=str)
def test_a_state_that_is_written_over_has_the_same_bits(rule: Rule, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, wide = dtypes
    planned = schedule((rule,) * 6, dtype, wide, 1e-2 if wide is F32 else None)
    if not planned.exact or planned.snapshots:
        pytest.skip("nothing is carried exactly over six steps")
    arithmetic = carry(tuple(step_of(rule) for _ in range(6)), planned)
    x, v, values = torch.randn(64).to(wide), None, [torch.randn(64).to(dtype) for _ in range(6)]
    for index, value in enumerate(values):
        x, v = arithmetic.enter(index, x, v)
        again = None if v is None else arithmetic.advance(index, x.clone(), v.clone(), value)
        x, v = arithmetic.advance(index, x, v, value, over=index > 0) if index else arithmetic.advance(0, x, v, value)
        assert again is None or all(map(torch.equal, again, (x, v)))
    for index in reversed(range(1, 6)):
        place, expected = x.data_ptr(), arithmetic.x_before(index, x, v)
        x = arithmetic.x_before(index, x, v, over=True)
        assert torch.equal(x, expected)
        assert x.data_ptr() == place
        place, expected = v.data_ptr(), arithmetic.v_before(index, x, v, values[index])
        v = arithmetic.v_before(index, x, v, values[index], over=True)
        assert torch.equal(v, expected)
        assert v.data_ptr() == place


def test_sums_of_gradients_take_none_for_zero() -> None:
    one, other = torch.ones(2), torch.full((2,), 2.0)
    assert added(None, None) is None
    assert added(one, None) is one
    assert added(None, other) is other
    assert torch.equal(added(one, other), torch.full((2,), 3.0))  # type: ignore[arg-type]


def test_retreat_of_a_wrapped_step_takes_x_away() -> None:
    x, v, value = values()
    step = step_of(Momentum(0.7), wrapped=True)
    _, v_after = advance(step, x, v, value)
    torch.testing.assert_close(retreat(step, x, v_after, value), v)
