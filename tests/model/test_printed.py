"""What a momentumized model says of itself when it is printed, and in the traces of a profiler."""

from __future__ import annotations

import pytest
import torch
from nets import ConvNet, Net, images, rows
from torch import nn
from torch.profiler import ProfilerActivity, profile

import mfx


def test_a_printed_model_says_what_is_momentum_and_at_which_gamma() -> None:
    model = Net()
    mm = mfx.momentumize(model, 0.7)
    assert "momentum: 3 blocks (blocks.0 to blocks.2), gamma=0.7" in repr(mm)
    mfx.set_gamma(mm, {"*.0": 0.0, "*": 0.9})
    assert "gamma=0.0 to 0.9" in repr(mm)
    assert "momentum" not in repr(model)
    lines = [line for line in repr(mm).splitlines() if "momentum" not in line]
    assert lines == repr(model).splitlines(), "beside that it is torch's own"


def test_options_that_are_not_as_usual_are_printed() -> None:
    assert "options" not in repr(mfx.momentumize(Net(), 0.7, capture="fx"))
    shown = repr(mfx.momentumize(Net(), 0.7, exclude="*.1", velocity="first", reversible=False))
    assert "momentum options: exclude=('*.1',), velocity='first', reversible=False" in shown


def test_what_a_class_says_of_itself_stays() -> None:
    class Told(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x

        def extra_repr(self) -> str:
            return "width=6"

    lines = repr(mfx.momentumize(Told(), 0.7)).splitlines()
    assert lines[:3] == ["Told(", "  width=6", "  momentum: 3 blocks (blocks.0 to blocks.2), gamma=0.7"]


def test_a_model_without_chains_prints_as_before() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(mfx.NothingRewrittenWarning):
        assert repr(mfx.momentumize(model)) == repr(model)


def traced(run: object) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()  # type: ignore[operator]
    return [event.name for event in sorted(found.events(), key=lambda event: event.time_range.start)]


@pytest.mark.parametrize("gamma", [0.0, 0.7])
@pytest.mark.parametrize("kind", [Net, ConvNet])
def test_blocks_have_their_names_in_traces_forward_and_backward(kind: type[nn.Module], gamma: float) -> None:
    mm, x = mfx.momentumize(kind(), gamma), rows() if kind is Net else images()
    mm(x).sum().backward()
    names = [name for name in traced(lambda: mm(x).sum().backward()) if name.startswith("mfx ")]
    ahead = [f"mfx blocks.{index}" for index in range(3)]
    assert names[:4] == ["mfx momentum_0", *ahead]
    assert names[4:] == [f"{name} again" for name in reversed(ahead)]
    assert [name for name in traced(lambda: mm.eval()(x.detach())) if name.startswith("mfx ")][:4] == names[:4]


def test_compiled_branches_have_their_names_too(fresh_dynamo: None) -> None:
    mm, x = mfx.momentumize(Net(p=0.0), 0.7), rows()
    compiled = torch.compile(mm, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    names = traced(lambda: compiled(x).sum().backward())
    assert {f"mfx blocks.{index}{again}" for index in range(3) for again in ("", " again")} <= set(names)
