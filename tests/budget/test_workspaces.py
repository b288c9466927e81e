"""What convolutions need while they run, against what the allocator reports of the same call."""

from __future__ import annotations

import pytest
import torch
from peaks import allocated_peak

from mfx.budget.live import LiveBytes
from mfx.torch_versions import FakeTensorMode

aten = torch.ops.aten


def foreseen(run, *tensors) -> int:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        with LiveBytes() as live:
            result = run(*fakes)
        del result
    return live.peak


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("shape", "weight", "stride", "groups", "how"),
    [
        pytest.param((16, 64, 16, 16), (64, 64, 3, 3), 1, 1, {}, id="of one size"),
        pytest.param((4, 256, 6, 6), (256, 256, 3, 3), 1, 1, {}, id="mostly weights"),
        pytest.param((4, 64, 24, 24), (256, 64, 3, 3), 1, 1, {}, id="wider"),
        pytest.param((4, 128, 24, 24), (128, 128, 3, 3), 2, 1, {}, id="strided"),
        pytest.param((4, 256, 24, 24), (512, 256, 1, 1), 2, 1, {}, id="strided shortcut"),
        pytest.param(
            (16, 64, 16, 16), (64, 64, 3, 3), 1, 1, {"memory_format": torch.channels_last}, id="channels last"
        ),
        pytest.param(
            (2, 250, 8, 8), (250, 250, 3, 3), 1, 1, {"memory_format": torch.channels_last}, id="channels last, odd"
        ),
        pytest.param((4, 16, 16, 16), (16, 16, 3, 3), 1, 1, {"dtype": torch.float64}, id="float64"),
        pytest.param((4, 96, 32, 32), (96, 1, 7, 7), 1, 96, {}, id="channel by channel"),
        pytest.param(
            (2, 384, 14, 14), (384, 1, 7, 7), 1, 384, {"memory_format": torch.channels_last}, id="channels last, alone"
        ),
    ],
)
def test_the_peak_of_a_convolution_is_that_of_the_allocator(shape, weight, stride, groups, how, mask):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    x, w = torch.randn(shape).to(**how), torch.randn(weight).to(**how)
    pad = weight[-1] // 2
    rest = (None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups)
    grad = torch.randn_like(aten.convolution(x, w, *rest))

    def backward(grad, x, w):
        return aten.convolution_backward(grad, x, w, [0], *rest[1:], [*mask, False])

    def forward(x, w):
        return aten.convolution(x, w, *rest)

    backward(grad, x, w)
    assert foreseen(forward, x, w) == pytest.approx(allocated_peak(lambda: forward(x, w)), rel=0.08)
    # Scratch memory, of which nothing is known, is all that a small result has.
    scratch = 500_000 if groups > 1 or how.get("dtype") is torch.float64 else 0
    real = allocated_peak(lambda: backward(grad, x, w))
    assert foreseen(backward, grad, x, w) == pytest.approx(real, rel=0.08, abs=scratch)


def test_a_matrix_product_needs_nothing_beside_its_result():
    a, b = torch.randn(256, 512), torch.randn(512, 128)
    assert foreseen(torch.mm, a, b) == allocated_peak(lambda: torch.mm(a, b)) == 256 * 128 * 4


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_in_another_order_than_x_is_copied(order):
    x, w = torch.randn(8, 64, 16, 16).to(memory_format=order), torch.randn(64, 64, 3, 3)
    other = torch.channels_last if order is torch.contiguous_format else torch.contiguous_format
    rest = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    same, differs = torch.randn_like(x), torch.randn_like(x).to(memory_format=other)

    def backward(grad, x, w):
        return aten.convolution_backward(grad, x, w, *rest)

    backward(same, x, w)
    for grad in (same, differs):
        assert foreseen(backward, grad, x, w) == pytest.approx(
            allocated_peak(lambda grad=grad: backward(grad, x, w)), 0.08
        )
    assert foreseen(backward, differs, x, w) - foreseen(backward, same, x, w) == 4 * x.numel()
