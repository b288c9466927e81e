"""M3, M5, M6, M9: what a recomputation may not show: no second side effect, no other draw, nothing kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, backward, kept_bytes, relative_error, run
from nets import ConvNet, Net, images, rows
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import mfx


def pair(model: nn.Module, gamma: Any = 0.8) -> tuple[nn.Module, nn.Module]:
    """The reversible and the stored run of one model."""
    return mfx.momentumize(model, gamma), mfx.momentumize(model, gamma, reversible=False)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda w: nn.BatchNorm2d(w, momentum=None), nn.InstanceNorm2d])
@pytest.mark.parametrize("whole", [None, "blocks.*"])
def test_running_statistics_move_once(norm: Callable[[int], nn.Module], whole: Any) -> None:
    model = ConvNet(p=0.0)
    for block in model.blocks:
        block.bn = norm(6).double()
        block.bn.track_running_stats = True
    mm = mfx.momentumize(model, 0.0, modules=whole)
    x = images()
    assert_same(run(mm, x), run(model, x))
    for _ in range(2):
        backward(mm(x))
    counts = [buffer.item() for name, buffer in mm.named_buffers() if "num_batches" in name]
    assert all(count in (0, 2) for count in counts)


class CodeBook(nn.Module):
    """Writes to a buffer of its own each time it runs in training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("table", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.linear(x - self.mean) * self.table


class CodeBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.code = CodeBook(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.code(x)


@pytest.mark.parametrize("whole", [None, "blocks.*"])
@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_that_the_branch_writes_and_reads_is_as_it_was(whole: Any, training: bool) -> None:
    model = Net(block=CodeBlock).train(training)
    mm = mfx.momentumize(model, 0.0, modules=whole)
    x = rows()
    for _ in range(2):
        assert_same(run(mm, x), run(model, x))


def test_a_buffer_that_is_written_in_one_mode_only_is_as_it_was_in_both() -> None:
    model = Net(block=CodeBlock)
    mm = mfx.momentumize(model, 0.0, modules="blocks.*")
    x = rows()
    for training in (False, True, False, True):
        assert_same(run(mm.train(training), x), run(model.train(training), x))


NORMED = {
    "parametrized spectral norm": parametrizations.spectral_norm,
    "parametrized weight norm": parametrizations.weight_norm,
    "parametrized orthogonal": parametrizations.orthogonal,
    "spectral norm": nn.utils.spectral_norm,
    "weight norm": nn.utils.weight_norm,
}


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_normed_weights_in_a_branch(name: str) -> None:
    model = Net(p=0.0)
    for block in model.blocks:
        NORMED[name](block.up)
    mm, (reversible, stored) = mfx.momentumize(model, 0.0), pair(model)
    x = rows()
    for training in (True, False):
        for each in (model, mm, reversible, stored):
            each.train(training)
        assert_same(run(mm, x), run(model, x))
        assert_same(run(reversible, x), run(stored, x))


class Noise(nn.Module):
    """Draws in its branch in the ways people do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * torch.rand_like(x) + torch.randn(x.shape, dtype=x.dtype)
        y = y[None] + self.attention(y[None], y[None], y[None])[0]
        return x + F.dropout(y[0], 0.5, self.training) * torch.bernoulli(torch.full_like(x, 0.7))


def test_every_draw_is_repeated_and_the_generator_ends_where_the_plain_model_leaves_it() -> None:
    model = Net(block=Noise)
    reversible, stored = pair(model)
    x = rows()
    assert_same(run(reversible, x), run(stored, x))
    assert_same(run(mfx.momentumize(model, 0.0), x), run(model, x))


def test_backward_leaves_the_generator_alone() -> None:
    mm = mfx.momentumize(Net(p=0.5))
    out = mm(rows())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    backward(out)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_autocast_is_put_back_for_the_recomputation() -> None:
    model = Net().float()
    reversible, stored = pair(model)
    x = rows().detach().float().requires_grad_()
    results = []
    for each in (reversible, stored):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            out = each(x)
        assert out.dtype == torch.bfloat16
        results.append(torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()]))
    assert relative_error(*results) < 1e-2


class UsedTwice(Net):
    """The first block's weight is used again after the chain."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return F.linear(F.linear(x, self.blocks[0].up.weight), self.blocks[0].down.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_used_in_the_chain_and_outside_keeps_its_gradient_under_autocast(dtype: torch.dtype) -> None:
    model = UsedTwice(p=0.0).float()
    x = rows().detach().float()
    results = []
    for each in pair(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = each(x)
        results.append(torch.autograd.grad(out.float().sum(), model.blocks[0].up.weight))
    assert relative_error(*results) < 2e-2


SEEN: list[tuple[int, ...]] = []


@torch.fx.wrap
def note_strides(x: Tensor) -> Tensor:
    SEEN.append(x.stride())
    return x


class Layout(Net):
    """The chain starts with a value in the layout that ``lay`` gives."""

    lay: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        x = self.lay(self.stem(x))
        for block in self.blocks:
            x = x + block.down(block.up(note_strides(x)))
        return self.head(x)


LAYOUTS = {
    "expanded": lambda x: x[:1].expand(5, -1),
    "sliced": lambda x: x.repeat(1, 2)[:, ::2],
    "transposed": lambda x: x.expand(6, 5, 6).transpose(0, 2).clone().transpose(0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_chains_input_is_put_back(layout: str) -> None:
    model, x = Layout(p=0.0), rows()
    model.lay = LAYOUTS[layout]
    reversible, stored = pair(model)
    expected = run(stored, x)
    run(reversible, x)  # the first call runs forward once more, to prove the capture
    SEEN.clear()
    assert_same(run(reversible, x), expected)
    assert SEEN[:3] == SEEN[:2:-1]


def test_channels_last_stays() -> None:
    model = ConvNet()
    seen = []

    class Look(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    for block in model.blocks:
        block.conv.__class__ = Look
    model.to(memory_format=torch.channels_last)
    mm = mfx.momentumize(model, 0.8, modules="blocks.*.conv", include="blocks.?")
    x = images().detach().to(memory_format=torch.channels_last).requires_grad_()
    mm(x)  # the first call runs forward once more, to prove the capture
    seen.clear()
    backward(mm(x))
    assert len(seen) == 6
    assert all(seen)


@pytest.mark.parametrize("make", [lambda depth: Net(depth, p=0.0), lambda depth: ConvNet(depth, p=0.0)])
def test_the_bytes_kept_do_not_grow_with_depth(make: Callable[[int], nn.Module]) -> None:
    x = rows() if isinstance(make(1), Net) else images()
    shallow, deep = (kept_bytes(mfx.momentumize(make(depth), 0.99), x) for depth in (6, 96))
    assert deep == shallow
    assert kept_bytes(make(6), x) > 4 * shallow


def test_at_gamma_0_one_state_a_block_is_kept() -> None:
    x = rows()
    kept = [kept_bytes(mfx.momentumize(Net(depth, p=0.0), 0.0), x) for depth in (5, 6)]
    assert kept[1] - kept[0] == 5 * 6 * 8


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_plain_recurrence_and_keeps_nothing(mode: Callable[[], Any]) -> None:
    reversible, stored = pair(Net())
    x = rows()
    with mode():
        torch.manual_seed(0)
        ours = reversible(x)
        torch.manual_seed(0)
        theirs = stored(x)
    assert torch.equal(ours, theirs)
    assert not ours.requires_grad


def test_without_gradients_each_branch_runs_once_and_nothing_is_kept() -> None:
    model = Net(depth=8, p=0.0)
    calls = []
    for block in model.blocks:
        block.down.register_forward_hook(lambda *_: calls.append(1))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mm = mfx.momentumize(model)
    assert kept_bytes(mm, rows().detach()) == 0
    assert len(calls) == 8


@pytest.mark.parametrize(("make", "inputs"), [(Net, rows), (ConvNet, images)])
def test_the_mode_that_counts_is_the_one_of_the_forward(make: Any, inputs: Any) -> None:
    def switch(model: nn.Module) -> None:
        model.eval()
        model.blocks[0].train()

    assert_changes_nothing(make(), inputs(), switch)


def test_the_gamma_that_counts_is_the_one_of_the_forward() -> None:
    assert_changes_nothing(Net(), rows(), lambda model: mfx.set_gamma(model, 0.1))


def test_a_dropout_probability_changed_after_the_forward_does_not_count() -> None:
    def change(model: nn.Module) -> None:
        model.blocks[1].drop_prob = 0.9

    assert_changes_nothing(ConvNet(), images(), change)


def assert_changes_nothing(model: nn.Module, x: Tensor, change: Callable[[nn.Module], None]) -> None:
    """``change`` between forward and backward leaves the gradients as they are."""
    found = []
    for do in (lambda _: None, change):
        mm = mfx.momentumize(model, 0.8)
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        out = mm(x)
        do(mm)
        backward(out)
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert relative_error(*found) < 1e-12


def test_the_order_of_the_operands_of_an_add_is_kept():
    """The sum of differently laid out tensors takes the layout of the first, and dropout draws in memory order."""

    class Layouts(nn.Module):
        def __init__(self, width: int, first: bool) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 1)
            self.first = first

        def forward(self, x: Tensor) -> Tensor:
            branch = self.conv(F.dropout(x, 0.3, self.training)).contiguous(memory_format=torch.channels_last)
            return branch + x if self.first else x + branch

    for first in (True, False):
        model = ConvNet(3, block=Layouts, first=first)
        for capture in ("fx", "dynamo"):
            mm = mfx.momentumize(model, 0.0, example_inputs=images(), capture=capture)
            x = images()
            assert_same(run(mm, x), run(model, x))


def flops_of(model: nn.Module, *inputs: Any) -> tuple[int, int]:
    """The floating point operations of a forward, and of a whole training step."""
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs)
        forward = counter.get_total_flops()
        backward(out)
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("make", [lambda depth: Net(depth), lambda depth: ConvNet(depth)])
def test_a_step_costs_the_plain_step_and_one_forward_of_the_branches(make: Any, gamma: float, whole: Any) -> None:
    x = (rows() if isinstance(make(1), Net) else images()).detach()
    outside = flops_of(make(0), x)[0]
    for depth in (1, 5, 30):
        model = make(depth)
        forward, plain = flops_of(model, x)
        for options in ({}, {"state_dtype": torch.float64, "tolerance": 1e-13}):
            ours = flops_of(mfx.momentumize(model, gamma, modules=whole, **options), x)
            assert ours == (forward, plain + forward - outside)
            assert forward > outside


@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("make", [lambda depth: Net(depth), lambda depth: ConvNet(depth)])
def test_at_gamma_0_the_product_that_a_branch_ends_in_is_not_computed_again(make: Any, whole: Any) -> None:
    x = (rows() if isinstance(make(1), Net) else images()).detach()
    outside = flops_of(make(0), x)[0]
    last = 2 * 5 * 12 * 6 if isinstance(make(1), Net) else 2 * 4 * 5 * 5 * 6 * 6 * 3 * 3
    for depth in (1, 5, 30):
        model = make(depth)
        forward, plain = flops_of(model, x)
        ours = flops_of(mfx.momentumize(model, 0.0, modules=whole), x)
        assert ours == (forward, plain + forward - outside - depth * last)


def test_a_step_that_asks_for_one_block_runs_again_only_what_is_after_it() -> None:
    model, x = Net(6, p=0.0), rows().detach()
    mm = mfx.momentumize(model, 0.9)
    _, whole = flops_of(mm, x)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(mm(x).sum(), model.blocks[4].up.weight)
    assert counter.get_total_flops() < 0.6 * whole


def test_gradients_under_a_module_tracker_are_those_without() -> None:
    model, x = Net(block=Noise), rows()
    reversible, stored = pair(model)
    expected = run(stored, x)
    with ModuleTracker() as tracker:
        assert_same(run(reversible, x), expected)
    assert tracker.parents == {"Global"}
