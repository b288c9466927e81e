"""Random operations under the compiler: one draw in forward and backward, and good random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

import mfx
from mfx.run.seeded.counter import Seed, bits, exponential, keeps, normal, uniform
from mfx.run.seeded.random import counted

WIDTH = 8
_MASK = torch.ones(4, 4, dtype=torch.bool).tril()


def _heads(h: Tensor) -> Tensor:
    return h.unflatten(-1, (2, -1)).transpose(1, 2)


def _attend(h: Tensor, **given) -> Tensor:
    h = _heads(h)
    return F.scaled_dot_product_attention(h, h, h, dropout_p=0.3, **given).transpose(1, 2).flatten(2)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.3),
    "dropout in place": lambda h: F.dropout(h, 0.3, True, True),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h, 0.3, True),
    "stochastic_depth row": lambda h: stochastic_depth(h, 0.4, "row"),
    "stochastic_depth batch": lambda h: stochastic_depth(h, 0.4, "batch"),
    "drop path, bernoulli_": lambda h: h * h.new_empty((h.shape[0], 1, 1)).bernoulli_(0.6).div_(0.6),
    "drop path, rand": lambda h: h.div(0.6) * (torch.rand((h.shape[0], 1, 1), dtype=h.dtype) + 0.6).floor_(),
    "attention": lambda h: _attend(h, is_causal=True),
    "attention, masked": lambda h: _attend(h, attn_mask=_MASK),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h),
    "randn_like": lambda h: h + 0.1 * torch.randn_like(h),
    "rand_like": lambda h: h * torch.rand_like(h),
    "normal_": lambda h: h * torch.empty_like(h).normal_(1, 0.1),
    "uniform_": lambda h: h * torch.empty_like(h).uniform_(0.5, 1.5),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.6)),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.3),
    "Dropout1d": lambda: nn.Dropout1d(0.3),
    "Dropout2d": lambda: nn.Sequential(nn.Unflatten(-1, (-1, 1)), nn.Dropout2d(0.3), nn.Flatten(2)),
    "Dropout3d": lambda: nn.Sequential(nn.Unflatten(-1, (-1, 1, 1)), nn.Dropout3d(0.3), nn.Flatten(2)),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "MultiheadAttention": lambda: Attention(need_weights=False),
    "MultiheadAttention with weights": lambda: Attention(need_weights=True),
}


class Attention(nn.Module):
    """Self-attention with dropout."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)
        self.need_weights = need_weights

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h, h, h, need_weights=self.need_weights)[0]


class Block(nn.Module):
    """x + after(draw(before(x)))."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.draw = MODULES[kind]() if kind in MODULES else FUNCTIONS[kind]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.draw(self.before(x)))


def seeded(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return net(x)

    return call


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(kind: str, inner: str) -> None:
    """Compiled gradients against finite differences, the seed fixed; and the draws are draws."""
    model = nn.Sequential(Block(kind), Block(kind)).double()
    net = torch.compile(model, backend=mfx.backend(0.7, inner), fullgraph=True)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded(net), (x,), eps=1e-6, atol=1e-6, fast_mode=True)
    torch.manual_seed(6)
    assert not torch.equal(net(x), seeded(net)(x))


@pytest.mark.parametrize("kind", ["Dropout", "drop path, rand", "attention", "MultiheadAttention"])
def test_gradients_against_finite_differences(kind):
    check(kind, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FUNCTIONS, *MODULES])
def test_gradients_of_every_form(kind):
    check(kind, "aot_eager")


def once(draw: Callable[[], Tensor], seed: int = 3, again: bool = False) -> Tensor:
    """What ``draw`` gives in a branch."""
    value = Seed(torch.tensor(seed))
    with counted(Seed.of_twin(value.twin()) if again else value, 2, "block"):
        return draw()


@pytest.mark.parametrize("kind", [*FUNCTIONS])
def test_a_recomputation_draws_the_same_and_another_seed_does_not(kind):
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)

    def draw() -> Tensor:
        return FUNCTIONS[kind](x.clone())

    state = torch.get_rng_state()
    assert torch.equal(once(draw), once(draw, again=True))
    assert any(not torch.equal(once(draw), once(draw, seed=seed)) for seed in range(10, 20))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "drop",
    [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("inplace", [False, True])
def test_forms_of_dropout_have_the_values_of_the_original(drop, inplace):
    shape = (40, 50, *(2,) * {"dropout1d": 1, "dropout2d": 2, "dropout3d": 3}.get(drop.__name__, 2))
    values = [once(lambda: drop(torch.full(shape, 2.0), 0.3, True, inplace)), drop(torch.full(shape, 2.0), 0.3, True)]
    for first, second in zip(*(value.unique() for value in values), strict=True):
        assert first == pytest.approx(float(second), rel=1e-5)
    found, expected = ((value == value.max()).double().mean() for value in values)
    assert float(found) == pytest.approx(float(expected), abs=0.06)
    # Whole channels drop together, or single values do, as in the original.
    whole, expected_whole = (bool((value == value[:, :, :1]).all()) for value in values)
    assert whole is expected_whole


@pytest.mark.parametrize(
    "given", [{"is_causal": True}, {"attn_mask": _MASK}, {"attn_mask": _MASK.double()}, {"scale": 0.3}]
)
def test_attention_from_its_definition(given):
    q, k, v = (torch.randn(2, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, **given)
    found = once(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, **given))
    assert torch.allclose(found, expected, atol=1e-9)


def test_no_dropout_and_evaluation_leave_values_alone():
    x = torch.randn(3, 4, WIDTH)
    assert torch.equal(once(lambda: F.dropout(x, 0.0)), x)
    assert torch.equal(once(lambda: F.dropout(x, 0.5, False)), x)
    assert torch.equal(once(lambda: F.alpha_dropout(x, 0.5, False)), x)
    assert torch.equal(once(lambda: torch.dropout(x, 0.5, False)), x)
    assert not once(lambda: F.dropout(x, 1.0)).any()


def test_what_cannot_be_repeated_is_refused():
    with pytest.raises(mfx.CompileError, match=r"block 'block': .*rrelu.*exclude='block'"):
        once(lambda: F.rrelu(torch.randn(3), training=True))
    assert once(lambda: F.rrelu(torch.ones(3))).tolist() == [1, 1, 1]


def test_bits_are_even_and_independent():
    count = 1 << 18
    drawn = {key: bits((count,), Seed(torch.tensor(key[0])), key[1]) for key in ((0, 0), (0, 1), (1, 0), (1 << 32, 0))}
    for value in drawn.values():
        assert value.min() >= 0
        assert value.max() < 2**32
        for bit in range(32):
            share = ((value >> bit) & 1).double().mean().item()
            assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(count)
        counts = torch.bincount(value >> 24, minlength=256).double()
        assert ((counts - count / 256) ** 2 / (count / 256)).sum() < 255 + 6 * math.sqrt(2 * 255)
    centred = torch.stack([value.double() / 2**32 - 0.5 for value in drawn.values()]) * math.sqrt(12)
    neighbours = torch.cat([centred, centred[:1].roll(1, -1), centred[:1].roll(256, -1)])
    correlation = (neighbours @ neighbours.T / count).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(count)


def test_distributions():
    seed = Seed(torch.tensor(11))
    count = 1 << 16
    assert float(keeps((count,), seed, 0, 0.3).double().mean()) == pytest.approx(0.7, abs=0.01)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        value = uniform((count,), seed, 1, dtype)
        assert value.dtype == dtype
        assert 0 <= value.min() <= value.max() < 1
        assert float(value.double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(exponential((count,), seed, 2).mean()) == pytest.approx(1, abs=0.02)
    value = normal((count,), seed, 3, 4)
    assert float(value.mean()) == pytest.approx(0, abs=0.02)
    assert float(value.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_inductor_draws_the_same():
    seed = torch.tensor(9)

    def draw(seed: Tensor) -> Tensor:
        return bits((7, 11), Seed(seed), 5)

    assert torch.equal(torch.compile(draw, fullgraph=True)(seed), draw(seed))
