"""Confirming: two real steps on a device that tells its bytes; here a stand-in for one, of the CPU's memory."""

from __future__ import annotations

import pytest
import torch
from peaks import allocated_peak
from torch import nn

import mfx
from mfx.budget.live import LiveBytes
from mfx.view.fits.confirming import measured_step


class Meter:
    """What torch's module of a device has, for the CPU: counts what is alive between a reset and the question.

    ``more`` is how many times that its kernels need; above ``most`` bytes it is out of memory.
    """

    def __init__(self):
        self.more, self.most, self.live = 1.0, None, None

    def memory_allocated(self, device):
        return 50_000_000  # what others hold

    def reset_peak_memory_stats(self, device):
        self.live = LiveBytes()
        self.live.__enter__()

    def max_memory_allocated(self, device):
        self.live.__exit__(None, None, None)
        if self.most is not None and self.live.peak > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return 50_000_000 + int(self.live.peak * self.more)


@pytest.fixture
def meter(monkeypatch):
    found = Meter()
    for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cpu, name, getattr(found, name), raising=False)
    return found


class Stack(nn.Module):
    """Blocks with dropout and statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)
        self.blocks = nn.Sequential(*(Branch(64) for _ in range(6)))
        self.head = nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.blocks(self.norm(x)))


class Branch(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(self.down(torch.tanh(self.up(x))))


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_two_steps_need_what_a_training_needs_and_leave_nothing(meter, optimizer):
    model, x = Stack(), torch.randn(512, 64)
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients, generator = [parameter.grad for parameter in model.parameters()], torch.get_rng_state()
    measured = measured_step(model, lambda: x, optimizer, gamma=0.9)
    assert torch.equal(generator, torch.get_rng_state())

    def training():
        mm, rows = mfx.momentumize(Stack()), torch.randn(512, 64)
        updates = None if optimizer is None else optimizer(mm.parameters(), lr=1e-6)
        for _ in range(2):
            mm.zero_grad()
            output = mm(rows)
            (output * 1).sum().backward()
            if updates is not None:
                updates.step()

    assert measured == pytest.approx(allocated_peak(training), rel=0.05)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(one is parameter.grad for one, parameter in zip(gradients, model.parameters(), strict=True))


def test_an_optimizer_that_is_made_already_takes_no_step_itself(meter):
    model = Stack()
    optimizer = torch.optim.Adam(model.parameters())
    assert measured_step(model, lambda: torch.randn(8, 64), optimizer, gamma=0.9) > 0
    assert not optimizer.state


def test_what_was_foreseen_and_is_measured_is_confirmed(meter):
    found = mfx.fit(Stack(), torch.randn(2, 64), "4MB", optimizer="adam")
    assert found.measured == pytest.approx(found.bytes, rel=0.05)
    assert found.measured <= 4_000_000 < found.next_bytes
    assert "two real steps needed" in str(found)


def test_what_needs_more_than_was_foreseen_is_made_smaller_until_it_fits(meter):
    foreseen = mfx.fit(Stack(), torch.randn(2, 64), "4MB").size
    meter.more = 1.5
    found = mfx.fit(Stack(), torch.randn(2, 64), "4MB")
    assert 1 < found.size < foreseen
    assert found.measured <= 4_000_000
    assert found.bytes == mfx.report(Stack(), torch.empty(found.size, 64)).step.total
    assert found.next_bytes is None
    assert "two real steps of size" in found.limit
    meter.more = 100.0
    with pytest.raises(
        mfx.OptionError, match=r"is too little: two real steps of size \d+ needed .*a smaller size is not possible"
    ):
        mfx.fit(Stack(), torch.randn(2, 64), "4MB")


def test_a_device_out_of_memory_is_a_size_too_large(meter):
    foreseen = mfx.fit(Stack(), torch.randn(2, 64), "10MB").size
    meter.most = 5_000_000
    found = mfx.fit(Stack(), torch.randn(2, 64), "10MB")
    assert foreseen > found.size > foreseen // 3
    assert "more than the device has" in found.limit


def test_a_device_that_tells_nothing_is_not_asked():
    asked = []
    assert measured_step(Stack(), lambda: asked.append(1), None, gamma=0.9) is None
    assert measured_step(Stack().to("meta"), lambda: asked.append(1), None, gamma=0.9) is None
    assert not asked
