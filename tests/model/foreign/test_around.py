"""M1, M12: what torch.distributed runs code around is called by a captured graph; the function stays what it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same, chain_names, relative_error
from nets import Block, Net, rows
from recurrence import NetByHand
from sharded import by_block, momentum, process_group, run_sharded
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import mfx


@pytest.fixture(autouse=True)
def alone(tmp_path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


class Pair(nn.Module):
    """Two residual adds in one forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.one(x))
        return x + torch.tanh(self.two(x))


class Two(nn.Module):
    """Two residual blocks of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Block(width, 0.0), Block(width, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Normed(nn.Module):
    """The norm of x and a branch of that: one add, which x itself does not take part in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + torch.tanh(self.inner(x))


def net(block: Any = Block) -> Net:
    torch.manual_seed(0)
    return Net(block=block)


def data() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("block", [Block, Pair, Two, Normed])
def test_sharded_before_each_block_is_one_step(block: Any):
    mm = momentum(net(block), "before")
    assert chain_names(mm) == (("blocks.0", "blocks.1", "blocks.2"),)
    assert_same(run_sharded(mm, data()), run_sharded(NetByHand(net(block), 0.8), data()))


@pytest.mark.parametrize(("block", "adds"), [(Block, 1), (Pair, 2), (Two, 2)])
def test_a_report_says_which_modules_are_one_step_instead_of_several(block: Any, adds: int):
    found = mfx.report(by_block(net(block)))
    assert dict(found.sharded) == {f"blocks.{number}": adds for number in range(3)}
    assert found.to_dict()["sharded"] == dict(found.sharded)
    assert ("blocks.0, blocks.1, blocks.2. The 2 residual blocks in each are one step" in str(found)) == (adds == 2)
    assert not mfx.report(net(block)).sharded


OTHERS = [
    (Pair, r"blocks\.0#0, blocks\.0#1"),
    (Two, r"blocks\.0\.one, blocks\.0\.two"),
    (Normed, r"blocks\.0"),
]


@pytest.mark.parametrize(("block", "names"), OTHERS)
@pytest.mark.parametrize("ran", [False, True])
def test_sharded_afterwards_what_would_be_another_function_is_refused(block: Any, names: str, ran: bool):
    mm = mfx.momentumize(net(block), 0.8)
    if ran:
        mm(data())
    by_block(mm)
    with pytest.raises(mfx.PlanChangedError, match=rf"'blocks\.0' was sharded after.*\({names}\).*modules='blocks\.0'"):
        mm(data())


@pytest.mark.parametrize("block", [Pair, Two, Normed])
def test_named_as_a_block_before_it_may_be_sharded_afterwards(block: Any):
    mm = momentum(net(block), "after", modules="blocks.?")
    assert_same(run_sharded(mm, data()), run_sharded(NetByHand(net(block), 0.8), data()))


class Looped(nn.Module):
    """Blocks in two stages of one chain, and a stage with a chain of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 6)
        self.stages = nn.ModuleList([nn.Sequential(Block(6, 0.0), Block(6, 0.0)) for _ in range(2)])
        self.down = nn.Linear(6, 8)
        self.last = nn.Sequential(Block(8, 0.0), Block(8, 0.0))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.last(self.down(x))


def test_a_module_that_a_whole_chain_runs_in_and_another_outside_of_it_is_refused():
    """The root has to be captured, since a chain runs through its own forward; so the last stage would be entered."""
    model = Looped()
    fully_shard(model.last)
    with pytest.raises(mfx.CaptureError, match=r"'last' is sharded.*captured graph of Looped.*modules='last'"):
        mfx.momentumize(model, 0.8)
    mm = mfx.momentumize(Looped(), 0.8)
    fully_shard(mm.last)  # type: ignore[arg-type]
    with pytest.raises(mfx.CaptureError, match=r"'last' is sharded"):
        mm(data())


def test_its_blocks_may_be_sharded_instead():
    model = Looped()
    for block in model.last:
        fully_shard(block)
    mm = mfx.momentumize(model, 0.8)
    assert chain_names(mm)[1] == ("last.0", "last.1")
    assert relative_error(mm(data()), mfx.momentumize(Looped(), 0.8)(data())) < 1e-12


def test_hooks_of_a_user_run_once_in_a_sharded_block():
    seen: list[tuple[int, ...]] = []
    model = net()
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    mm = mfx.momentumize(by_block(model), 0.8)
    mm(rows()).sum().backward()
    assert seen == [(5, 6)]


@pytest.mark.parametrize("order", ["before", "after"])
def test_dynamo_calls_what_is_sharded(order: str):
    """This model's Python cannot be followed by symbols."""

    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            if x.shape[0] > 100:
                x = x * 2
            for number, block in enumerate(self.blocks):
                x = block(x) if x.shape[-1] == self.width else x + number
            return self.head(x)

    torch.manual_seed(0)
    model = Branching(p=0.0)
    mm = momentum(model, order, example_inputs=data().detach(), capture="dynamo", modules="blocks.?")
    torch.manual_seed(0)
    expected = run_sharded(NetByHand(Branching(p=0.0), 0.8), data())
    for _ in range(2):
        found = run_sharded(mm, data())
        assert relative_error(found.grads, expected.grads) < 1e-10
        assert relative_error(found.outputs, expected.outputs) < 1e-10
