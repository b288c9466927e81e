"""Sequences of different lengths without padding: jagged tensors, packed sequences, tokens with ``cu_seqlens``.

Each way works like the original, at the first call and at later ones with other lengths, or is refused by name.
Judged by the original at gamma = 0, and elsewhere by the recurrence written out with plain autograd; train mode,
dropout alive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, run
from small_models import randomized
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import mfx
from mfx.memory import values_of
from mfx.torch_versions import FakeTensor

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

WIDTH = 8
LENGTHS = ([3, 5, 2], [4, 1], [2, 2, 6, 1], [3, 5, 2])
Branch = Callable[[Tensor], Tensor]


class Branches(nn.Module):
    """Residual branches f(x) with norm and dropout; ``recur`` runs them, by hand where ``gamma`` says so."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.gamma: float | None = None
        self.fs = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.3))
            for _ in range(depth)
        )

    def recur(self, x: Tensor, mixed: Callable[[Tensor], Tensor]) -> Tensor:
        v: Any = 0.0
        for f in self.fs:
            if self.gamma is None:
                x = x + mixed(f(x))
            else:
                v = self.gamma * v + (1 - self.gamma) * mixed(f(x))
                x = x + v
        return x


class Jagged(Branches):
    """The state itself is a jagged tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.recur(x, lambda value: value).values()


class Mixing(Branches):
    """A jagged state whose branches look along all tokens of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        def mixed(value: Tensor) -> Tensor:
            return torch.nested.nested_tensor_from_jagged(value.values().cumsum(0) / 8, value.offsets())

        return self.recur(x, mixed).values()


class Within(Branches):
    """Jagged inside of the model alone."""

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.recur(torch.nested.nested_tensor_from_jagged(tokens, offsets), lambda value: value).values()


class Segments(Branches):
    """Attention within sequences by a mask made from ``cu_seqlens``."""

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        segment = torch.bucketize(torch.arange(tokens.shape[0]), cu_seqlens[1:], right=True)
        mask = segment[:, None] == segment[None]
        return self.recur(
            tokens, lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=mask)[0]
        )


class Unpadded(Branches):
    """Attention on padded tokens, which a mask packs again: a size that depends on values."""

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        index = cu_seqlens[:-1, None] + torch.arange(longest)[None]
        there = index < cu_seqlens[1:, None]
        index = index.clamp(max=tokens.shape[0] - 1)

        def attended(h: Tensor) -> Tensor:
            mask = there[:, None, :].expand(-1, longest, -1)
            return F.scaled_dot_product_attention(h[index], h[index], h[index], attn_mask=mask)[there]

        return self.recur(tokens, attended)


class Packed(Branches):
    """Blocks on the data of a packed sequence."""

    def forward(self, sequences: PackedSequence) -> Tensor:
        return self.recur(sequences.data, lambda value: value)


class Trunk(Branches):
    """Blocks on tokens of any number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.recur(x, lambda value: value)


class AfterRecurrence(nn.Module):
    """Packed in, packed out, after a recurrent layer, with the blocks in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH)
        self.trunk = Trunk()

    def forward(self, sequences: PackedSequence) -> PackedSequence:
        found, _ = self.rnn(sequences)
        return found._replace(data=self.trunk(found.data))


class Attention(nn.Module):
    """A block in whose forward Python loops over the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        parts = self.f(x).split(cu_seqlens.diff().tolist())
        return x + torch.cat([F.scaled_dot_product_attention(h[None], h[None], h[None])[0] for h in parts])


class Looping(nn.Module):
    """Such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma: float | None = None
        self.blocks = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        v: Any = 0.0
        for block in self.blocks:
            if self.gamma is None:
                x = block(x, cu_seqlens)
            else:
                v = self.gamma * v + (1 - self.gamma) * (block(x, cu_seqlens) - x)
                x = x + v
        return x


def tokens(lengths: list[int]) -> Tensor:
    return torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(sum(lengths))).double()


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)])


def jagged(lengths: list[int], layout: torch.layout = torch.jagged) -> Tensor:
    return torch.nested.nested_tensor(list(tokens(lengths).split(lengths)), layout=layout)


def packed(lengths: list[int]) -> PackedSequence:
    return pack_sequence(list(tokens(lengths).split(lengths)), enforce_sorted=False)


WAYS: dict[type[nn.Module], Callable[[list[int]], tuple[Any, ...]]] = {
    Jagged: lambda lengths: (jagged(lengths),),
    Mixing: lambda lengths: (jagged(lengths),),
    Within: lambda lengths: (tokens(lengths), boundaries(lengths)),
    Segments: lambda lengths: (tokens(lengths), boundaries(lengths)),
    Unpadded: lambda lengths: (tokens(lengths), boundaries(lengths), max(lengths)),
    Packed: lambda lengths: (packed(lengths),),
    AfterRecurrence: lambda lengths: (packed(lengths),),
    Looping: lambda lengths: (tokens(lengths), boundaries(lengths)),
}
OPTIONS: dict[type[nn.Module], dict[str, Any]] = {Looping: {"modules": "blocks.*"}}


def made(kind: type[nn.Module]) -> nn.Module:
    return randomized(kind()).double().train()


@contextlib.contextmanager
def by_hand(model: nn.Module, gamma: float) -> Iterator[None]:
    """The model computes the recurrence meanwhile; itself at gamma = 0."""
    held = [module for module in model.modules() if hasattr(module, "gamma")]
    for module in held:
        module.gamma = gamma or None
    yield
    for module in held:
        module.gamma = None


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_every_length_is_the_recurrence_by_hand(kind: type[nn.Module], gamma: float) -> None:
    model, inputs = made(kind), WAYS[kind]
    mm = mfx.momentumize(model, gamma, example_inputs=inputs(LENGTHS[0]), **OPTIONS.get(kind, {}))
    assert [len(chain.blocks) for chain in mfx.chains(mm)] == [3]
    for lengths in LENGTHS:
        got = run(mm, *inputs(lengths))
        with by_hand(model, gamma):
            assert_same(got, run(model, *inputs(lengths)))


@pytest.mark.parametrize("kind", [Jagged, Mixing, Within, Segments, Unpadded, Looping], ids=lambda kind: kind.__name__)
def test_what_needs_no_example_works_without_one(kind: type[nn.Module]) -> None:
    model, inputs = made(kind), WAYS[kind]
    mm = mfx.momentumize(model, 0.8, **OPTIONS.get(kind, {}))
    for lengths in LENGTHS:
        got = run(mm, *inputs(lengths))
        with by_hand(model, 0.8):
            assert_same(got, run(model, *inputs(lengths)))


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("leaf", [True, False])
def test_a_jagged_input_gets_the_gradient_of_the_recurrence(capture: str, leaf: bool) -> None:
    model = made(Jagged)
    mm = mfx.momentumize(model, 0.8, example_inputs=jagged([3, 5, 2]), capture=capture)

    def gradient(net: nn.Module) -> Tensor:
        x = jagged([4, 1]).requires_grad_()
        torch.manual_seed(0)
        net(x if leaf else x * 1).square().sum().backward()
        assert x.grad is not None
        return x.grad.values()

    got = gradient(mm)
    with by_hand(model, 0.8):
        torch.testing.assert_close(got, gradient(model), rtol=1e-10, atol=1e-12)


def test_dropout_of_nothing_leaves_the_generator_of_a_jagged_model_where_it_is() -> None:
    model = made(Jagged)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    mm = mfx.momentumize(model, 0.8)
    ends = []
    for net in (model, mm):
        torch.manual_seed(0)
        net(jagged([3, 5, 2])).sum().backward()
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_report_and_verify_take_the_inputs_too(kind: type[nn.Module]) -> None:
    model, example = made(kind), WAYS[kind](LENGTHS[0])
    report = mfx.report(model, example, **OPTIONS.get(kind, {}))
    assert len(report.rewritable) == 3
    assert str(report)
    found = mfx.verify(model, example, **OPTIONS.get(kind, {}))
    # The allocator has more of torch's own for these few tokens than their blocks keep.
    assert (found.original_verdict, found.reversible_verdict) == ("ok", "ok"), str(found)
    assert found.saved_bytes < found.saved_bytes_stored


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_a_report_counts_the_values_of_a_jagged_state(capture: Any) -> None:
    report = mfx.report(made(Jagged), jagged([3, 5, 2]), capture=capture)
    assert {block.shape for block in report.blocks} == {(10, WIDTH)}
    assert report.chains[0].state_bytes == 2 * 10 * WIDTH * 8  # x and v in float64


class Selected(Branches):
    """Blocks on the tokens that a mask takes: how many, depends on values."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.recur(x[mask], lambda value: value)


def test_a_report_says_nothing_of_bytes_that_depend_on_values() -> None:
    example = tokens([6]), torch.arange(6) % 2 == 0
    report = mfx.report(made(Selected), example, capture="dynamo")
    assert report.rewritable == ["#0", "#1", "#2"]
    assert report.chains[0].state_bytes is None
    assert "MiB" not in str(report)


class Reshaped(Branches):
    """Selected tokens in another shape around each block."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x[mask]
        for f in self.fs:
            x = x.reshape(-1, 2, WIDTH).transpose(0, 1)
            x = (x + f(x)).transpose(0, 1).reshape(-1, WIDTH)
        return x


def test_shapes_that_depend_on_values_are_no_shapes_to_move_a_reshape_by() -> None:
    example = tokens([6]), torch.arange(6) < 4
    assert mfx.report(made(Reshaped), example, capture="dynamo").rewritable == ["#0", "#1", "#2"]


def test_the_bytes_that_a_jagged_model_keeps_do_not_grow_with_its_depth() -> None:
    x = jagged([30, 50, 20])
    kept = [mfx.kept_bytes(mm, [x], lambda mm=mm: mm(x))[0] for mm in (mfx.momentumize(m, 0.8) for m in _deep())]
    assert kept[0] == kept[1] >= 2 * 100 * WIDTH * 8


def _deep() -> list[nn.Module]:
    return [randomized(Jagged(depth)).double() for depth in (3, 9)]


def test_a_size_that_turns_out_to_broadcast_is_an_error_that_names_the_block() -> None:
    model = made(Picking)
    x, all_rows, one_row = tokens([4]), torch.ones(4) > 0, torch.arange(4) == 1
    mm = mfx.momentumize(model, 0.8, example_inputs=(x, all_rows), capture="dynamo")
    got = run(mm, x, all_rows)
    with by_hand(model, 0.8):
        assert_same(got, run(model, x, all_rows))
    with pytest.raises(mfx.ShapeError, match="#0"):
        mm(x, one_row)


class Picking(Branches):
    """Adds the rows that a mask takes."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.recur(x, lambda value: value[mask])


def test_the_bytes_that_a_call_keeps_are_not_those_of_a_capture_within_it() -> None:
    model = made(Mixing)
    mm = mfx.momentumize(model, 0.8, example_inputs=jagged([3, 5, 2]), capture="dynamo")
    seen: list[Tensor] = []
    x = jagged([3, 5, 2]).requires_grad_()  # another call for Dynamo, so it captures while the hooks are on
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: seen.append(saved) or saved, lambda saved: saved):
        mm(x)
    assert seen
    assert not any(isinstance(value, FakeTensor) for saved in seen for value in (saved, values_of(saved)))


# What is refused


def test_symbols_for_a_packed_sequence_are_refused_by_the_name_of_the_argument() -> None:
    with pytest.raises(mfx.CaptureError, match=r"argument 'sequences' .*PackedSequence.*capture='dynamo'"):
        mfx.momentumize(made(Packed), capture="fx", example_inputs=(packed([3, 2]),))


def test_a_loop_over_sequences_is_refused_with_the_module_to_take_whole() -> None:
    with pytest.raises(mfx.CaptureError, match=r"in module 'blocks\.0'.*(?s:.*)modules='blocks\.0'"):
        mfx.momentumize(made(Looping), example_inputs=WAYS[Looping]([3, 2]))


@pytest.mark.parametrize("call", [mfx.momentumize, mfx.report, mfx.verify])
def test_strided_nested_tensors_are_refused_by_the_name_of_the_argument(call: Any) -> None:
    with pytest.raises(mfx.InputTypeError, match=r"argument 'x' .*torch\.strided.*layout=torch\.jagged"):
        call(made(Jagged), example_inputs=jagged([3, 2], torch.strided))


def test_strided_nested_tensors_are_refused_at_a_call() -> None:
    mm = mfx.momentumize(made(Jagged))
    with pytest.raises(mfx.InputTypeError, match=r"argument 'x' .*torch\.strided.*layout=torch\.jagged"):
        mm(jagged([3, 2], torch.strided))


def test_a_chain_of_functions_refuses_them_too() -> None:
    net = mfx.MomentumNet([nn.Linear(WIDTH, WIDTH).double() for _ in range(3)], 0.8)
    with pytest.raises(mfx.InputTypeError, match=r"momentum.*layout torch\.strided.*layout=torch\.jagged"):
        net(jagged([3, 2], torch.strided))
