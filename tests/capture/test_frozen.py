"""What a capture may hold for good, and what it refuses to."""

from __future__ import annotations

import enum
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from graphs import net
from helpers import assert_same, run
from torch import Tensor

import mfx

X = torch.randn(3, 4, dtype=torch.float64)


class Bag:
    """Holds a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@dataclass(frozen=True)
class Fixed:
    """Holds it, and cannot be given another; but the tensor may be written to."""

    x: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Settings:
    """Plain values."""

    scale: float = 2.0
    names: tuple[str, ...] = field(default=("a",))


class Side(enum.Enum):
    """Which layer."""

    LEFT = "f"
    RIGHT = "g"


def of_bag(self, bag):
    x = bag.x
    return x + self.f(x)


@pytest.mark.parametrize("kind", [Bag, Fixed])
def test_an_object_that_holds_a_tensor_is_refused_by_name_and_type(kind):
    mm = mfx.momentumize(net(of_bag), 0.0, capture="fx")
    with pytest.raises(mfx.CaptureError, match=rf"argument 'bag' holds a .*{kind.__name__}, .*capture='dynamo'"):
        mm(kind(X))


@pytest.mark.parametrize("kind", [Bag, Fixed])
def test_an_object_is_followed_by_dynamo_to_what_it_holds_now(kind):
    model = net(of_bag)
    mm = mfx.momentumize(model, 0.0)
    bag = kind(X)
    assert torch.equal(mm(bag), model(bag))
    object.__setattr__(bag, "x", 2 * X)
    assert torch.equal(mm(bag), model(bag))
    assert torch.equal(mm(kind(X - 1)), model(kind(X - 1)))


def test_objects_inside_containers_are_found():
    def forward(self, bags):
        x = bags["one"][0].x
        return x + self.f(x)

    mm = mfx.momentumize(net(forward), 0.0, capture="fx")
    with pytest.raises(mfx.CaptureError, match=r"argument 'bags' holds a .*Bag"):
        mm({"one": [Bag(X)]})


def test_the_batches_of_passed_steps_are_let_go():
    model = net(of_bag)
    mm = mfx.momentumize(model, 0.0)
    seen = []
    for _ in range(4):
        bag = Bag(torch.randn(3, 4, dtype=torch.float64))
        seen.append(weakref.ref(bag.x))
        mm(bag)
    del bag
    assert sum(ref() is not None for ref in seen) <= 1


def squared(x):
    """A plain function."""
    return x * x


def with_plain(self, x, settings, side, function, size, dtype, many):
    y = getattr(self, side.value)(x) * settings.scale + function(x).sum()
    return x + y.to(dtype).view(size)[many]


def test_plain_values_functions_and_settings_are_part_of_the_form():
    model = net(with_plain)
    example = (X, Settings(), Side.RIGHT, squared, torch.Size([3, 4]), torch.float64, slice(None))
    mm = mfx.momentumize(model, 0.0, capture="fx", example_inputs=example)
    for side, function in ((Side.LEFT, squared), (Side.RIGHT, squared), (Side.LEFT, torch.tanh)):
        given = (Settings(3.0), side, function, torch.Size([3, 4]), torch.float64, slice(None))
        assert_same(run(mm, X, *given), run(model, X, *given))
    assert torch.equal(mm(X, Settings(5.0), *given[1:]), model(X, Settings(5.0), *given[1:]))


def test_a_function_with_a_closure_may_be_another_the_next_time_and_is_refused():
    scale = [1.0]
    mm = mfx.momentumize(net(lambda self, x, f: x + self.f(f(x))), 0.0, capture="fx")
    with pytest.raises(mfx.CaptureError, match=r"argument 'f' holds a builtins.function"):
        mm(X, lambda x: x * scale[0])


def test_a_tensor_kept_as_a_plain_attribute_may_be_replaced():
    model = net(lambda self, x: x + self.f(x) * self.__dict__["scale"])
    model.__dict__["scale"] = torch.full((4,), 2.0, dtype=torch.float64)
    mm = mfx.momentumize(model, 0.0, capture="fx")
    assert torch.equal(mm(X), model(X))
    mm.__dict__["scale"] = model.__dict__["scale"] = torch.full((4,), 5.0, dtype=torch.float64)
    assert torch.equal(mm(X), model(X))


def test_a_buffer_that_a_forward_adds_to_stays_the_models_own():
    def forward(self, x):
        self.seen += x.detach().abs().sum()
        return x + self.f(x)

    model = net(forward, seen=torch.zeros(()))
    own = model.seen
    mm = mfx.momentumize(model, 0.0, capture="fx")
    assert model.seen is own
    assert mm.seen is own
    assert_same(run(mm, X), run(model, X))


def test_a_buffer_that_a_forward_replaces_is_refused_and_stays():
    def forward(self, x):
        self.seen = self.seen + x.detach().abs().sum()
        return x + self.f(x)

    model = net(forward, seen=torch.zeros(()))
    own = model.seen
    with pytest.raises(mfx.CaptureError, match=r"sets self\.seen"):
        mfx.momentumize(model, 0.0, capture="fx")
    assert model.seen is own


def test_a_forward_that_leaves_gradients_off_is_refused_and_they_are_on_again():
    def forward(self, x):
        torch.set_grad_enabled(False)
        return x + self.f(x)

    with pytest.raises(mfx.CaptureError, match="leaves another grad mode"):
        mfx.momentumize(net(forward), capture="fx")
    assert torch.is_grad_enabled()


def test_a_capture_of_one_autocast_state_is_none_of_another():
    def forward(self, x):
        return x + self.f(x) * (2 if torch.is_autocast_enabled("cpu") else 3)

    model = net(forward).float()
    mm, x = mfx.momentumize(model, 0.0, capture="fx"), X.float()
    assert torch.equal(mm(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mm(x), model(x))
    assert torch.equal(mm(x), model(x))
