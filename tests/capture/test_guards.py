"""What changes on a model after the capture is taken up, or an error names the blocks; never ignored."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import relative_error
from nets import Block, Net, rows
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mfx

GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.8])


class Loop(Net):
    """Its blocks are in a list, which its own forward runs through."""

    def __init__(self) -> None:
        super().__init__(4, p=0.0)
        self.blocks = nn.ModuleList(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Doubled(Block):
    """Another branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.down(torch.tanh(self.up(x)))


def by_hand(model: Net, x: Tensor, gamma: float) -> Tensor:
    x = model.stem(x)
    v = torch.zeros_like(x)
    for block in model.blocks:
        v = gamma * v + (1 - gamma) * (copy.copy(block)(x) - x)  # what is copied by itself is the plain block
        x = x + v
    return model.head(x)


def gradients(y: Tensor, model: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True))


def right(mm: nn.Module, gamma: float) -> None:
    """The model as it is now, against the recurrence of its blocks as they are now."""
    x = rows()
    assert relative_error(mm(x), by_hand(mm, x, gamma)) < 1e-10  # type: ignore[arg-type]
    assert relative_error(gradients(mm(x), mm), gradients(by_hand(mm, x, gamma), mm)) < 1e-9  # type: ignore[arg-type]


@GAMMAS
@pytest.mark.parametrize("kind", [Block, Doubled])
def test_a_replaced_block_is_an_error_since_the_original_does_not_have_it(kind: type[Block], gamma: float) -> None:
    mm = mfx.momentumize(Loop(), gamma)
    right(mm, gamma)
    mm.blocks[1] = kind(6, 0.0).double()
    with pytest.raises(mfx.PlanChangedError, match=r"block 'blocks\.1' was replaced \((Block|Doubled) stands"):
        mm(rows())


@GAMMAS
def test_blocks_in_another_order_are_an_error_since_the_original_has_them_in_the_first(gamma: float) -> None:
    mm = mfx.momentumize(Loop(), gamma)
    mm(rows())
    mm.blocks = nn.ModuleList(reversed(list(mm.blocks)))
    with pytest.raises(mfx.PlanChangedError, match=r"block 'blocks\.0' was replaced"):
        mm(rows())


@GAMMAS
@pytest.mark.parametrize(
    "edit",
    [
        lambda blocks: blocks.append(Block(6, 0.0).double()),
        lambda blocks: blocks.insert(0, Block(6, 0.0).double()),
        lambda blocks: blocks.__delitem__(3),
        lambda blocks: blocks.__setitem__(1, nn.Identity()),
    ],
    ids=["append", "insert", "delete", "identity"],
)
def test_other_blocks_than_at_first_are_an_error_that_names_one(edit: Callable[..., None], gamma: float) -> None:
    mm = mfx.momentumize(Loop(), gamma)
    mm(rows())
    edit(mm.blocks)
    with pytest.raises(mfx.PlanChangedError, match=r"block 'blocks\.\d'"):
        mm(rows())


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


@GAMMAS
def test_a_parametrization_registered_afterwards_is_run(gamma: float) -> None:
    mm = mfx.momentumize(Loop(), gamma)
    mm(rows())
    parametrize.register_parametrization(mm.blocks[2].up, "weight", Scaled())
    right(mm, gamma)


class Sine(nn.Linear):
    """A linear layer that is one no more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


@GAMMAS
def test_another_class_of_a_module_is_seen(gamma: float) -> None:
    mm = mfx.momentumize(Loop(), gamma)
    mm(rows())
    mm.blocks[2].up.__class__ = Sine
    right(mm, gamma)
    mm.blocks[1].__class__ = Doubled  # of a block itself: the original has another
    with pytest.raises(mfx.PlanChangedError, match=r"blocks\.1"):
        mm(rows())


class Tied(Block):
    """Uses two weights by name, functionally."""

    def __init__(self, width: int, p: float) -> None:
        super().__init__(width, p)
        self.one, self.other = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.one) @ self.other


@GAMMAS
@pytest.mark.parametrize("tied_first", [True, False])
def test_weights_used_by_name_may_be_tied_and_untied_afterwards(tied_first: bool, gamma: float) -> None:
    model = Loop()
    model.blocks = nn.ModuleList(Tied(6, 0.0) for _ in range(3)).double()
    apart = copy.deepcopy(model.state_dict())

    def tie() -> None:
        for block in model.blocks:
            block.other = block.one

    if tied_first:
        tie()
    mm = mfx.momentumize(model, gamma)
    right(mm, gamma)
    tie() if not tied_first else mm.load_state_dict(apart, assign=True)
    right(mm, gamma)
