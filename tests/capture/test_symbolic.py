"""Numbers that vary from call to call: one graph for all values where it is the same computation, else one each."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same, run
from nets import Block, Net, rows
from torch import Tensor, nn

import mfx
from mfx.model.conversion import momentum_of

CAPTURES = pytest.mark.parametrize("capture", ["fx", "dynamo"])
MOST = 6


class TimedBlock(Block):
    """x + t f(x)."""

    def forward(self, x: Tensor, t: float) -> Tensor:  # type: ignore[override]
        return x + self.down(self.dropout(self.up(self.norm(x)))) * (1 + t)


class Timed(Net):
    """A diffusion model's shape: every block is told the time."""

    def __init__(self, depth: int = 3, p: float = 0.2) -> None:
        super().__init__(depth, block=TimedBlock, p=p)

    def forward(self, x: Tensor, t: float) -> Tensor:  # type: ignore[override]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, t)
        return self.head(x)


class Decides(Timed):
    """Python decides by the number."""

    def forward(self, x: Tensor, t: float) -> Tensor:
        return super().forward(x.tanh() if t > 0.5 else x, t)


class AsksType(Timed):
    """Python looks at the number's type."""

    def forward(self, x: Tensor, t: float) -> Tensor:
        return super().forward(x if isinstance(t, float) else x.tanh(), t)


class LooksUp(Timed):
    """Python looks the number up in a table."""

    def forward(self, x: Tensor, t: float) -> Tensor:
        return super().forward(x * {0.25: 3.0}.get(t, 1.0), 0.0)


class Formats(Timed):
    """Python computes with the number what no graph can."""

    def forward(self, x: Tensor, t: float) -> Tensor:
        return super().forward(x, math.sin(t))


class ScaledBlock(Block):
    """x + f(x), the add told the factor as alpha: a block for each single factor, and none for any."""

    def forward(self, x: Tensor, t: float) -> Tensor:  # type: ignore[override]
        return torch.add(x, self.down(self.dropout(self.up(x))), alpha=t)


class Scaled(Net):
    """Its number is the alpha of its adds."""

    def __init__(self) -> None:
        super().__init__(block=ScaledBlock)

    def forward(self, x: Tensor, t: float) -> Tensor:  # type: ignore[override]
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, t)
        return self.head(x)


def count(mm: nn.Module) -> int:
    return len(momentum_of(mm).entries)


@CAPTURES
def test_fifty_floats_are_two_graphs_and_right(capture: str) -> None:
    model = Timed()
    mm = mfx.momentumize(model, 0.0, example_inputs=(rows(), 0.3), capture=capture)
    for step in range(50):
        x = rows()
        assert_same(run(mm, x, step / 7), run(model, x, step / 7))
    assert count(mm) == 2


def test_a_general_graph_is_momentum_too() -> None:
    model = Timed(p=0.0)
    mm = mfx.momentumize(model, 0.9, example_inputs=(rows(), 0.3))
    for t in (0.3, 0.5, 0.75):
        one = mfx.momentumize(model, 0.9, example_inputs=(rows(), t))
        x = rows()
        assert_same(run(mm, x, t), run(one, x, t))
    assert count(mm) == 2


@pytest.mark.parametrize("kind", [Decides, AsksType, LooksUp, Formats])
@CAPTURES
def test_where_python_decides_by_the_number_it_still_does(kind: type[Timed], capture: str) -> None:
    model = kind()
    mm = mfx.momentumize(model, 0.0, example_inputs=(rows(), 0.3), capture=capture)
    for t in (0.3, 0.7, 0.25, 0.6, 2, 0.4, 1, 0.9):
        x = rows()
        assert_same(run(mm, x, t), run(model, x, t))


def test_a_number_that_a_plan_depends_on_stays_in_its_graph() -> None:
    model = Scaled()
    mm = mfx.momentumize(model, 0.0, example_inputs=(rows(), 0.5))
    assert len(mfx.chains(mm)[0].blocks) == 3
    for t in (0.5, 0.25, 0.125):
        x = rows()
        assert_same(run(mm, x, t), run(model, x, t))
        assert len(mfx.chains(mm)[0].blocks) == 3


def test_whole_numbers_floats_and_flags_are_told_apart() -> None:
    class Kinds(Net):
        def forward(self, x: Tensor, t: object) -> Tensor:  # type: ignore[override]
            factor = {bool: 2.0, int: 3.0, float: 5.0}[type(t)]
            return super().forward(x * factor)

    model = Kinds()
    mm = mfx.momentumize(model, 0.0, example_inputs=(rows(), 1))
    for t in (1, True, 1.0, 2, False, 2.0, 0.0, -0.0, math.nan, math.nan):
        x = rows()
        assert_same(run(mm, x, t), run(model, x, t))
    before = count(mm)
    mm(rows(), math.nan)
    assert count(mm) == before, "NaN is found again"


@pytest.fixture
def _few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfx.model.state._MOST_GRAPHS", MOST)


@pytest.mark.usefixtures("_few_graphs")
@pytest.mark.parametrize("kind", [Decides, Timed])
def test_graphs_are_bounded_all_together(kind: type[Timed]) -> None:
    model = kind()
    mm = mfx.momentumize(model, 0.0, example_inputs=(rows(), 0.3))
    for step in range(12):
        mm(rows(), step / 12)
        with torch.no_grad():
            mm(rows(), step / 13)
        mm.train(step % 2 == 0)
    assert count(mm) == MOST


@pytest.mark.usefixtures("_few_graphs")
def test_the_graph_used_last_stays() -> None:
    model = Decides()
    mm = mfx.momentumize(model, 0.0, example_inputs=(rows(), 0.3))
    kept = momentum_of(mm).entries[0]
    for step in range(3 * MOST):
        mm(rows(), 0.3)
        mm(rows(), 1.0 + step)
    assert kept in momentum_of(mm).entries
