"""Live bytes: what is set aside counts apart, and gradients are, as they are made."""

from __future__ import annotations

import pytest
import torch
from peaks import allocated_peak
from torch import nn

from mfx.budget.live import LiveBytes
from mfx.budget.step import peak_of


def test_what_is_set_aside_counts_in_the_whole_alone_until_it_goes():
    with LiveBytes() as live:
        first = torch.ones(1024)
        live.set_aside(first)
        live.set_aside(first[2:])  # the same memory
        assert (live.now, live.aside) == (0, 4096)
        second = first + 1
        assert (live.now, live.peak, live.peak_with_aside) == (4096, 4096, 8192)
        del first
        assert (live.now, live.aside) == (4096, 0)
        third = second + 1
    assert (live.now, live.peak, live.peak_with_aside) == (8192, 8192, 8192)
    live.set_aside(torch.ones(8))  # from outside of the run
    assert (live.now, live.aside) == (8192, 0)
    del third


@pytest.mark.parametrize(("width", "rows"), [(256, 16), (64, 2048)], ids=["gradients are most", "activations are most"])
def test_a_step_that_makes_its_gradients_has_the_peak_that_the_allocator_sees(width, rows):
    layers = [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(4)]
    model, x = nn.Sequential(*layers), torch.randn(rows, width)

    def step():
        output = model(x)
        (output * 1).sum().backward()

    found = peak_of(torch.fx.symbolic_trace(model).graph, model, [x])
    step()
    model.zero_grad()
    assert found.with_gradients == pytest.approx(allocated_peak(step), rel=0.02)
    # The gradients are there by now, and remain the same.
    assert found.bytes == pytest.approx(allocated_peak(step), rel=0.02)
    assert found.left == rows * width * 4 + 4  # the outputs and the loss
