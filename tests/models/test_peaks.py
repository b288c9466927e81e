"""The peak of a training step, beside that of a checkpoint around every block; by the allocator (M3, M14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peaks import allocated_peak
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mfx
from mfx.rule.base import Rule


class Convolutions(nn.Module):
    """A residual block with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.dropout = nn.BatchNorm2d(16), nn.Dropout(0.1)

    def branch(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.relu(self.norm(self.first(x)))))

    @property
    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [self.branch]

    def ends(self, x: Tensor) -> list[tuple[nn.Module, int]]:
        """The products that branches end in, and the last size of what they are given."""
        return [(self.second, x.shape[-1])]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Layer(nn.Module):
    """A layer of a transformer, with two residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(32), nn.LayerNorm(32)
        self.read, self.write = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.dropout = nn.Linear(32, 128), nn.Linear(128, 32), nn.Dropout(0.1)

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.read(x).unflatten(-1, (3, 2, 16)).movedim(2, 0).transpose(2, 3).unbind()
        return self.write(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    @property
    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda x: self.attend(self.before(x)),
            lambda x: self.down(self.dropout(F.gelu(self.up(self.between(x))))),
        ]

    def ends(self, x: Tensor) -> list[tuple[nn.Module, int]]:
        return [(self.write, 32), (self.down, 128)]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.before(x))
        return x + self.down(self.dropout(F.gelu(self.up(self.between(x)))))


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


GENERATOR = torch.get_rng_state().nbytes
"""Each block draws, and mfx and checkpoint keep a state of the generator for it, which is not counted here."""

KINDS = {"convolutions": (Convolutions, (8, 16, 16, 16)), "transformer": (Layer, (8, 64, 32))}


def stack(kind: str, depth: int) -> tuple[nn.Sequential, Tensor]:
    block, shape = KINDS[kind]
    torch.manual_seed(0)
    return nn.Sequential(*(block() for _ in range(depth))), torch.randn(shape)


def checkpointed(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*map(Checkpointed, model))


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    return lambda: model(x).square().mean().backward()


def with_gradients(model: nn.Sequential, x: Tensor) -> int:
    """The peak of a step in which gradients are there already."""
    step(model, x)()
    step(model, x)()
    return allocated_peak(step(model, x)) - len(model) * GENERATOR


def first(model: nn.Sequential, x: Tensor) -> int:
    """The peak of a step that creates the gradients."""
    step(model, x)()
    model.zero_grad()
    return allocated_peak(step(model, x)) - len(model) * GENERATOR


def of_a_branch(model: nn.Sequential, x: Tensor) -> int:
    """The peak of a branch that is run and differentiated by itself, from an x and to gradients that are there."""
    x, grad = x.clone().requires_grad_(), torch.randn_like(x)
    runs = [lambda branch=branch: branch(x).backward(grad) for branch in model[0].branches]  # type: ignore[union-attr]
    for run in runs:
        run()
    return max(map(allocated_peak, runs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("depth", "dtype", "states"), [(8, "float32", 3.1), (24, "float64", 7.1)])
def test_what_a_backward_holds_beside_the_branch_that_it_recomputes(kind: str, depth: int, dtype: str, states: float):
    """In float32 three states of x: x and v, and gradients for both, of which the branch alone counts one as its own.

    Where x and v are carried in float64, each counts twice, and so does what v is computed from.
    """
    model, x = stack(kind, depth)
    assert f"state in {dtype}" in str(mfx.report(model, x, gamma=0.9))
    assert with_gradients(mfx.momentumize(model, 0.9), x) <= of_a_branch(model, x) + states * x.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_does_not_grow_with_depth(kind: str):
    peaks = [with_gradients(mfx.momentumize(model, 0.9), x) for model, x in (stack(kind, 24), stack(kind, 96))]
    assert peaks[1] <= 1.05 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "depth", "most"), [("convolutions", 64, 0.22), ("transformer", 24, 0.68)])
def test_the_peak_is_a_share_of_that_of_checkpoints(kind: str, depth: int, most: float):
    model, x = stack(kind, depth)
    assert with_gradients(mfx.momentumize(model, 0.9), x) <= most * with_gradients(checkpointed(model), x)


@pytest.mark.parametrize("depth", [6, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_at_gamma_0_the_peak_is_not_above_that_of_checkpoints(kind: str, depth: int):
    """But for the gradients of one layer's parameters, which leave together where it has several adds."""
    model, x = stack(kind, depth)
    layer = sum(parameter.nbytes for parameter in model[0].parameters()) if kind == "transformer" else 0
    most = with_gradients(checkpointed(model), x) + layer + x.nbytes // 10
    assert with_gradients(mfx.momentumize(model, 0.0), x) <= most


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("depth", [2, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_is_at_most_five_states_above_that_of_checkpoints(kind: str, depth: int, gamma: float):
    model, x = stack(kind, depth)
    assert first(mfx.momentumize(model, gamma), x) <= first(checkpointed(model), x) + 5 * x.nbytes


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize("frozen", [0, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_blocks_in_front_are_not_recomputed(kind: str, frozen: int, gamma: float):
    """A step costs that of the model and one forward of the branches that train, to the operation.

    At gamma 0 the product that a branch ends in is not computed again.
    """
    model, x = stack(kind, 6)
    model[:frozen].requires_grad_(False)
    mm = mfx.momentumize(model, gamma)
    with torch.no_grad():
        branches = flops(lambda: model[frozen:](x))
        ends = model[0].ends(x)  # type: ignore[operator]
        last = sum(flops(lambda end=end, n=n: end(torch.empty(*x.shape[:-1], n))) for end, n in ends)
    assert branches > last > 0
    ended = (6 - frozen) * last if gamma == 0 else 0
    assert flops(step(mm, x)) == flops(step(model, x)) + branches - ended


@pytest.mark.parametrize("frozen", [0, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_blocks_in_front_are_not_inverted(kind: str, frozen: int, monkeypatch: pytest.MonkeyPatch):
    """Nor is the first step that trains: what its v was, nobody asks."""
    model, x = stack(kind, 6)
    model[:frozen].requires_grad_(False)
    mm, undone = mfx.momentumize(model, 0.9), []
    real = Rule.retreat
    monkeypatch.setattr(Rule, "retreat", lambda *given: undone.append(given[0]) or real(*given))
    step(mm, x)()
    assert len(undone) == (6 - frozen) * len(model[0].branches) - 1  # type: ignore[arg-type]
