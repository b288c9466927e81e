"""nn.Transformer and its stacks against recurrences written by hand from the layers' own parts.

Float64, dropout alive under one seed, masks and key padding masks as run-time arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, chain_names, relative_error, run
from torch import Tensor, nn

import mfx

GAMMA = 0.8
WIDTH, HEADS, BATCH, SOURCE, TARGET = 8, 2, 3, 5, 4
Branch = Callable[[Tensor], Tensor]


def recurrence(x: Tensor, branches: list[Branch], gamma: float) -> Tensor:
    """One chain from v_0 = 0."""
    v = torch.zeros_like(x)
    for f in branches:
        v = gamma * v + (1 - gamma) * f(x)
        x = x + v
    return x


def sublayer(norm: nn.Module, f: Branch, norm_first: bool) -> Branch:
    """Pre-norm: f(norm(x)); post-norm: the whole map norm(x + f(x)), less x."""
    return (lambda x: f(norm(x))) if norm_first else (lambda x: norm(x + f(x)) - x)


def encoder_by_hand(stack: Any, x: Tensor, gamma: float, mask: Any = None, src_key_padding_mask: Any = None) -> Tensor:
    branches: list[Branch] = []
    for layer in stack.layers:
        attend = lambda x, m=layer: m._sa_block(x, mask, src_key_padding_mask)  # noqa: E731
        branches.append(sublayer(layer.norm1, attend, layer.norm_first))
        branches.append(sublayer(layer.norm2, layer._ff_block, layer.norm_first))
    x = recurrence(x, branches, gamma)
    return x if stack.norm is None else stack.norm(x)


def decoder_by_hand(
    stack: Any,
    x: Tensor,
    memory: Tensor,
    gamma: float,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
) -> Tensor:
    branches: list[Branch] = []
    for layer in stack.layers:
        attend = lambda x, m=layer: m._sa_block(x, tgt_mask, tgt_key_padding_mask)  # noqa: E731
        cross = lambda x, m=layer: m._mha_block(x, memory, memory_mask, memory_key_padding_mask)  # noqa: E731
        branches.append(sublayer(layer.norm1, attend, layer.norm_first))
        branches.append(sublayer(layer.norm2, cross, layer.norm_first))
        branches.append(sublayer(layer.norm3, layer._ff_block, layer.norm_first))
    x = recurrence(x, branches, gamma)
    return x if stack.norm is None else stack.norm(x)


def transformer_by_hand(model: Any, src: Tensor, tgt: Tensor, gamma: float, **masks: Any) -> Tensor:
    memory = encoder_by_hand(model.encoder, src, gamma, masks.get("src_mask"), masks.get("src_key_padding_mask"))
    names = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    return decoder_by_hand(model.decoder, tgt, memory, gamma, **{name: masks.get(name) for name in names})


def encoder(norm_first: bool, activation: Any = "relu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 16, dropout=0.2, activation=activation, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 3, nn.LayerNorm(WIDTH), enable_nested_tensor=False).double()


def decoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 16, dropout=0.2, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 2).double()


def transformer(norm_first: bool) -> nn.Module:
    return nn.Transformer(
        WIDTH, HEADS, 2, 2, 16, dropout=0.2, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )


def values(length: int) -> Tensor:
    return torch.randn(BATCH, length, WIDTH, dtype=torch.float64, requires_grad=True)


def padding(length: int) -> Tensor:
    """True where a position is padding: more of it in later rows, none in the first."""
    return torch.arange(length) >= length - torch.arange(BATCH)[:, None]


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


def spread(model: nn.Module) -> nn.Module:
    """Parameters away from their symmetric start, norms included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_hand(mm: nn.Module, forward: Callable[..., Tensor]) -> nn.Module:
    """The same parameters with another forward."""
    twin = copy.copy(mm)
    twin.forward = lambda *args, **kwargs: forward(mm, *args, **kwargs)
    return twin


CASES: dict[str, tuple[Any, Any, Callable[[], tuple[Any, ...]], list[Any]]] = {
    "encoder": (
        encoder,
        lambda model, gamma: lambda m, x, **masks: encoder_by_hand(m, x, gamma, **masks),
        lambda: (values(SOURCE),),
        [{}, {"mask": causal(SOURCE)}, {"src_key_padding_mask": padding(SOURCE)}],
    ),
    "decoder": (
        decoder,
        lambda model, gamma: lambda m, x, memory, **masks: decoder_by_hand(m, x, memory, gamma, **masks),
        lambda: (values(TARGET), values(SOURCE)),
        [{}, {"tgt_mask": causal(TARGET), "memory_key_padding_mask": padding(SOURCE)}],
    ),
    "transformer": (
        transformer,
        lambda model, gamma: lambda m, src, tgt, **masks: transformer_by_hand(m, src, tgt, gamma, **masks),
        lambda: (values(SOURCE), values(TARGET)),
        [
            {},
            {
                "tgt_mask": causal(TARGET),
                "src_key_padding_mask": padding(SOURCE),
                "memory_key_padding_mask": padding(SOURCE),
            },
        ],
    ),
}
GIVEN = [(name, index) for name, case in CASES.items() for index in range(len(case[3]))]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_stacks_equal_the_recurrence_written_by_hand(name: str, given: int, norm_first: bool) -> None:
    make, forward, inputs, masks = CASES[name]
    model = spread(make(norm_first))
    args, kwargs = inputs(), masks[given]
    example = dict(zip(("src", "tgt", "memory"), args, strict=False))
    if name == "decoder":
        example = {"tgt": args[0], "memory": args[1]}
    for reversible in (True, False):
        mm = mfx.momentumize(model, GAMMA, example_inputs={**example, **kwargs}, reversible=reversible)
        blocks = {"encoder": 6, "decoder": 6, "transformer": 10}[name]
        assert sum(map(len, chain_names(mm))) == blocks
        hand = by_hand(mm, forward(model, GAMMA))
        assert_same(run(mm, *args, **kwargs), run(hand, *args, **kwargs))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_at_gamma_zero_stacks_are_the_original(name: str, given: int, norm_first: bool) -> None:
    make, _, inputs, masks = CASES[name]
    model = spread(make(norm_first))
    args, kwargs = inputs(), masks[given]
    names = ("tgt", "memory") if name == "decoder" else ("src", "tgt")
    mm = mfx.momentumize(model, 0.0, example_inputs={**dict(zip(names, args, strict=False)), **kwargs})
    assert_same(run(mm, *args, **kwargs), run(model, *args, **kwargs))


@pytest.mark.parametrize("norm_first", [False, True])
def test_inference_without_gradients_is_the_same_function(norm_first: bool) -> None:
    """PyTorch's fast path would put each layer, adds and all, into one operation there."""
    x = values(SOURCE)
    mm = mfx.momentumize(spread(encoder(norm_first)), GAMMA, example_inputs=x).eval()
    with_gradients = mm(x)
    with torch.no_grad():
        assert relative_error([mm(x)], [with_gradients]) < 1e-12
        assert relative_error([encoder_by_hand(mm, x, GAMMA)], [with_gradients]) < 1e-12
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_masks_and_lengths_than_the_example_are_taken_at_run_time() -> None:
    x = values(SOURCE)
    mm = mfx.momentumize(spread(encoder(True)), GAMMA, example_inputs=x, capture="dynamo")
    hand = by_hand(mm, lambda m, x, **masks: encoder_by_hand(m, x, GAMMA, **masks))
    for length in (3, 6, 7):
        for masks in ({}, {"src_key_padding_mask": padding(length)}, {"mask": causal(length)}):
            x = values(length)
            assert_same(run(mm, x, **masks), run(hand, x, **masks))


def test_custom_activations_and_layers_before_and_after() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, WIDTH)
            self.body = encoder(False, nn.SiLU())
            self.head = nn.Linear(WIDTH, 2)
            self.double()

        def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
            return self.head(self.body(self.embed(x), src_key_padding_mask=padding).mean(1))

    model = spread(Model())
    x = torch.randn(BATCH, SOURCE, 3, dtype=torch.float64)
    mm = mfx.momentumize(model, GAMMA, example_inputs=(x, padding(SOURCE)))
    hand = by_hand(mm, lambda m, x, p: m.head(encoder_by_hand(m.body, m.embed(x), GAMMA, None, p).mean(1)))
    assert_same(run(mm, x, padding(SOURCE)), run(hand, x, padding(SOURCE)))
