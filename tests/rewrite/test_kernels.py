"""Compiled arithmetic of states: the bits of the eager one, whatever lies in memory, and however."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfx.rewrite.kernels import fused
from mfx.rule.arithmetic.carry import EAGER

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "with gaps": lambda x: torch.cat([x, x], -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def bits(value: Tensor) -> Tensor:
    return value.view({8: torch.int64, 4: torch.int32}[value.element_size()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("branch", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_kernels_give_the_bits_of_the_eager_ones(layout: str, branch: torch.dtype, backend: str) -> None:
    made = fused(backend)
    for size in (5, 8):  # one compilation is for all sizes
        x, w, value = (torch.randn(2, 3, size, size, dtype=torch.float64) for _ in range(3))
        x, w, value = map(LAYOUTS[layout], (x, (w * 2.0**30).round(), value.to(branch)))
        per_w, unit = torch.tensor(2.0**28 * 0.3, dtype=torch.float64), torch.tensor(2.0**-20, dtype=torch.float64)
        given = x, w, value, False, per_w, 2.0**-13 * 0.7, unit
        for mine, theirs in zip(made.forward(*given), EAGER.forward(*given), strict=True):
            assert torch.equal(bits(mine), bits(theirs))
        assert torch.equal(bits(made.x_before(x, w, 0.7, unit)), bits(EAGER.x_before(x, w, 0.7, unit)))
        assert torch.equal(bits(made.w_before(w, value, False, per_w)), bits(EAGER.w_before(w, value, False, per_w)))


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        *((layout, "aot_eager") for layout in ("contiguous", "channels last", "with gaps")),
        pytest.param("channels last", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_kernels_write_over_a_state_what_the_eager_ones_give(layout: str, backend: str) -> None:
    made = fused(backend)
    per_w, unit = torch.tensor(2.0**28 * 0.3, dtype=torch.float64), torch.tensor(2.0**-20, dtype=torch.float64)
    for size in (5, 8):
        x, w, value = (torch.randn(2, 3, size, size, dtype=torch.float64) for _ in range(3))
        x, w, value = map(LAYOUTS[layout], (x, (w * 2.0**30).round(), value))
        given = value, False, per_w, 2.0**-13 * 0.7, unit
        expected = EAGER.forward(x, w, *given)
        found = made.forward(x, w, *given, True)
        for mine, theirs, state in zip(found, expected, (x, w), strict=True):
            assert torch.equal(bits(mine), bits(theirs))
            assert mine.data_ptr() == state.data_ptr()
        expected_x = EAGER.x_before(x, w, 0.7, unit)
        assert torch.equal(bits(made.x_before(x, w, 0.7, unit, True)), bits(expected_x))
        expected_w = EAGER.w_before(w, value, False, per_w)
        assert torch.equal(bits(made.w_before(w, value, False, per_w, True)), bits(expected_w))
        assert torch.equal(bits(x), bits(expected_x))
        assert torch.equal(bits(w), bits(expected_w))


def test_a_step_is_undone_bit_for_bit() -> None:
    """By the definition: x = x' - round(w' ratio) unit, w = w' - round(F per_w)."""
    made = fused("aot_eager")
    unit, per_w, ratio = torch.tensor(2.0**-20), torch.tensor(1e7, dtype=torch.float64), 2.0**-13 * 0.7
    x = (torch.randn(64, dtype=torch.float64) * 2**20).round() * 2.0**-20
    w, branch = (torch.randn(64, dtype=torch.float64) * 1e8).round(), torch.randn(64)
    x_after, w_after = made.forward(x, w, branch, False, per_w, ratio, unit.double())
    assert torch.equal(w_after, w + torch.round(branch.double() * per_w))
    assert torch.equal(x_after, x + torch.round(w_after * ratio) * unit)
    assert torch.equal(made.x_before(x_after, w_after, ratio, unit.double()), x)
    assert torch.equal(made.w_before(w_after, branch, False, per_w), w)
