"""Models whose Python looks at data around or between the blocks, so that only the blocks can be captured.

The recurrence is written by hand in stand-ins for the blocks, within the model's own Python: v goes on where a block is
given the very value that another handed out, and is 0 elsewhere.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor, nn

import mfx
from mfx.memory import allocated_bytes, step_bytes
from mfx.model.parts import parts_of

GAMMAS = pytest.mark.parametrize("gamma", [0.0, 0.9, -0.5])


class Block(nn.Module):
    """x + f(x), with dropout."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.2)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def feed(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.gelu(self.up(self.norm(x)))))

    @property
    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        """f of each residual add."""
        return [self.feed]

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


class Layer(Block):
    """Attention, then the feed-forward part."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.before, self.read, self.write = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.read(self.before(x)).chunk(3, -1)
        return self.write(F.scaled_dot_product_attention(query, key, value))

    @property
    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        return [self.attend, self.feed]


class Model(nn.Module):
    """A stem, blocks, a head; subclasses say in which way the blocks run."""

    def __init__(self, depth: int = 5, block: type[Block] = Block, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.double()

    def forward(self, x: Tensor, *args: Any) -> Any:
        return self.head(self.through(self.stem(x), *args))

    def through(self, x: Tensor, *args: Any) -> Tensor:
        raise NotImplementedError


class LayerDrop(Model):
    """As wav2vec2, HuBERT and Whisper drop layers in training."""

    p = 0.4

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training and torch.rand([]) < self.p:
                continue
            x = block(x)
        return x


class Never(LayerDrop):
    p = 0.0


class Before(Model):
    """A look at a mask before the stack."""

    def through(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.any():
            x = x * mask.logical_not()[..., None]
        for block in self.blocks:
            x = block(x)
        return x


class Between(Model):
    """A look at a mask before each block: where something is masked, x is another value, and a chain begins."""

    def through(self, x: Tensor, mask: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number % 2 and mask.any():
                x = x * mask.logical_not()[..., None]
            x = block(x)
        return x


class EarlyExit(Model):
    """As many blocks as it takes for x to be large."""

    def through(self, x: Tensor, enough: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.norm() > enough:
                break
        return x


class Looped(Model):
    """One block, as often as the data say."""

    def through(self, x: Tensor, times: Tensor) -> Tensor:
        while times > 0:
            x, times = self.blocks[0](x), times - 1
        return x


class Tapped(LayerDrop):
    """Each x is handed out as well."""

    def forward(self, x: Tensor) -> Any:
        x, seen = self.stem(x), []
        for block in self.blocks:
            if self.training and torch.rand([]) < self.p:
                continue
            x = block(x)
            seen.append(x)
        return self.head(x), seen


class Chain:
    """x and v as the last stand-in left them."""

    x: Tensor | None = None
    v: Any = 0.0


class StandIn(nn.Module):
    """The recurrence over the residual adds of one block."""

    def __init__(self, block: Block, chain: Chain, gamma: float) -> None:
        super().__init__()
        self.block, self.chain, self.gamma = block, chain, gamma

    def forward(self, x: Tensor) -> Tensor:
        v = self.chain.v if x is self.chain.x else 0.0
        for branch in self.block.branches:
            v = self.gamma * v + (1 - self.gamma) * branch(x)
            x = x + v
        self.chain.x, self.chain.v = x, v
        return x


def by_hand(model: Model, gamma: float) -> Model:
    """The model's own Python over stand-ins, which share the parameters."""
    other, chain = copy.copy(model), Chain()
    other._modules = {**model._modules, "blocks": nn.ModuleList(StandIn(b, chain, gamma) for b in model.blocks)}
    return other


Step = tuple[Any, list["Tensor | None"], Tensor]


def step(model: nn.Module, *inputs: Any, seed: int = 1, loss: Any = None) -> Step:
    """The output, the gradients of the parameters, and the random generator afterwards."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(*inputs)
    after = torch.get_rng_state()
    (out.square().sum() if loss is None else loss(out)).backward()
    return out, [None if p.grad is None else p.grad.clone() for p in model.parameters()], after


def assert_alike(got: Step, expected: Step, tolerance: float = 1e-10) -> None:
    assert relative_error(got[0], expected[0]) <= tolerance
    assert [grad is None for grad in got[1]] == [grad is None for grad in expected[1]]
    assert relative_error(got[1], expected[1]) <= tolerance
    assert torch.equal(got[2], expected[2])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = rows(3, 5, 4)
NONE, SOME = torch.zeros(3, 5, dtype=torch.bool), torch.arange(15).reshape(3, 5) % 4 == 0


@GAMMAS
@pytest.mark.parametrize("block", [Block, Layer])
@pytest.mark.parametrize("kind", [LayerDrop, Never])
def test_layers_that_are_dropped_are_no_steps(kind: type[Model], block: type[Block], gamma: float) -> None:
    model = kind(block=block)
    mm, hand = mfx.momentumize(model, gamma, example_inputs=X), by_hand(model, gamma)
    for seed in range(4):
        assert_alike(step(mm, X, seed=seed), step(hand, X, seed=seed))
    assert_alike(step(mm.eval(), X), step(hand.eval(), X))
    assert_alike(step(mm.train(), X, seed=9), step(hand.train(), X, seed=9))


@GAMMAS
@pytest.mark.parametrize("kind", [Before, Between])
def test_a_look_at_a_mask_before_or_between_the_blocks(kind: type[Model], gamma: float) -> None:
    model = kind()
    mm, hand = mfx.momentumize(model, gamma, example_inputs=(X, NONE)), by_hand(model, gamma)
    for mask in (NONE, SOME, NONE):
        assert_alike(step(mm, X, mask), step(hand, X, mask))


@GAMMAS
@pytest.mark.parametrize("enough", [0.0, 1e9])
def test_an_early_exit(gamma: float, enough: float) -> None:
    """Also where the example leaves after the first block: the others are captured for its call."""
    model = EarlyExit()
    mm = mfx.momentumize(model, gamma, example_inputs=(X, torch.tensor(enough)))
    assert set(parts_of(mm)) == {f"blocks.{number}" for number in range(5)}
    for bound in (0.0, 12.0, 1e9):
        assert_alike(step(mm, X, torch.tensor(bound)), step(by_hand(model, gamma), X, torch.tensor(bound)))


@GAMMAS
def test_a_loop_as_long_as_the_data_say(gamma: float) -> None:
    """Beyond the length of the example, too, in float32, where the state is kept every few steps."""
    model = Looped(1)
    mm, hand = mfx.momentumize(model, gamma, example_inputs=(X, torch.tensor(3))), by_hand(model, gamma)
    for times in (1, 3, 40):
        assert_alike(step(mm, X, torch.tensor(times)), step(hand, X, torch.tensor(times)), 1e-9)
    model.float(), mm.float()
    single = X.float()
    assert_alike(step(mm, single, torch.tensor(40)), step(hand, single, torch.tensor(40)), 1e-4)


@pytest.mark.parametrize("kept", [False, True])
def test_a_value_between_blocks_has_its_gradient_with_and_without_what_comes_after(kept: bool) -> None:
    """A loss on it alone finds the state by undoing the later blocks; also where their values are gone."""
    model = Tapped()
    mm, hand = mfx.momentumize(model, 0.9, example_inputs=X), by_hand(model, 0.9)

    def on_one(number: int) -> Callable[[Any], Tensor]:
        def loss(out: Any) -> Tensor:
            if not kept:
                value = out[1][number].square().sum()
                out[1].clear()
                return value
            grads = torch.autograd.grad(out[1][number].square().sum(), model.stem.weight, retain_graph=True)
            grads += torch.autograd.grad(out[0].sum(), model.stem.weight, retain_graph=True)
            return out[1][number].cos().sum() + out[0].square().sum() + sum(grad.sum() for grad in grads)

        return loss

    for number in range(3):
        expected = step(hand, X, seed=7, loss=on_one(number))
        assert_alike(step(mm, X, seed=7, loss=on_one(number)), expected)


def test_a_second_backward_is_the_first_once_more_or_an_error() -> None:
    mm = mfx.momentumize(Never(), 0.9, example_inputs=X)
    loss = mm(X).square().sum()
    first = torch.autograd.grad(loss, list(mm.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(mm.parameters()))
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()


def test_several_forwards_before_a_backward_and_two_calls_in_one() -> None:
    """Each call is a chain of its own, though the second is given what the first handed out."""

    class Bare(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                if x.isnan().any():
                    break
                x = block(x)
            return x

    model, x = Bare(), rows(3, 5, 6)
    mm = mfx.momentumize(model, 0.9, example_inputs=x)

    def loss(net: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(3)
        one, other = net(x), net(2 * x)
        return (net(one) * other).sum()

    def hand(x: Tensor) -> Tensor:
        return by_hand(model, 0.9)(x)

    expected = torch.autograd.grad(loss(hand), list(model.blocks.parameters()))
    assert relative_error(torch.autograd.grad(loss(mm), list(model.blocks.parameters())), expected) < 1e-10


def test_a_value_that_is_changed_in_place_between_blocks_begins_a_chain_or_is_an_error() -> None:
    class Written(Model):
        def through(self, x: Tensor, written: bool) -> Tensor:
            for block in self.blocks:
                if not x.isnan().any() and written:
                    x *= 0.5
                x = block(x)
            return x

    model = Written(block=Layer)
    mm, single = mfx.momentumize(model, 0.9, example_inputs=(X, False)), X.float()
    with pytest.raises(mfx.BackwardError, match="changed in place"):
        step(mm, X, True)  # the state, in float64 as the model, is that very value

    class Halved(StandIn):
        def forward(self, x: Tensor) -> Tensor:
            self.chain.x = None
            return super().forward(x)

    hand = by_hand(model, 0.9)
    hand.blocks = nn.ModuleList(Halved(block.block, Chain(), 0.9) for block in hand.blocks)
    with torch.no_grad():
        torch.manual_seed(1)
        got = mm(X, True)
        torch.manual_seed(1)
        torch.testing.assert_close(got, hand(X, True))
    assert single.dtype == torch.float32


def test_without_gradients_and_in_inference_mode_it_is_the_recurrence() -> None:
    model = Never().eval()
    mm, expected = mfx.momentumize(model, 0.9, example_inputs=X), by_hand(model, 0.9)(X)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(mm(X), expected)
    torch.testing.assert_close(mfx.momentumize(model, 0.9, example_inputs=X, reversible=False)(X), expected)


def test_frozen_blocks_hand_their_velocity_on() -> None:
    model = Never()
    for block in (model.stem, *model.blocks[:2]):
        block.requires_grad_(False)
    mm = mfx.momentumize(model, 0.9, example_inputs=X)
    assert_alike(step(mm, X), step(by_hand(model, 0.9), X))


def test_blocks_that_store_and_blocks_that_do_not_are_one_chain() -> None:
    """Some run without gradient, others with it."""

    class Half(Model):
        def through(self, x: Tensor) -> Tensor:
            for number, block in enumerate(self.blocks):
                with torch.set_grad_enabled(number > 1 and not x.isnan().any()):
                    x = block(x)
            return x

    model = Half()
    mm = mfx.momentumize(model, 0.9, example_inputs=X)
    assert_alike(step(mm, X), step(by_hand(model, 0.9), X))


def test_copies_and_pickles_are_linked_among_themselves() -> None:
    model = LayerDrop()
    mm = mfx.momentumize(model, 0.9, example_inputs=X)
    expected = step(by_hand(model, 0.9), X)
    for twin in (copy.deepcopy(mm), pickle.loads(pickle.dumps(mm))):
        assert_alike(step(twin, X), expected)
        assert list(twin.state_dict()) == list(model.state_dict())
        mfx.set_gamma(twin, 0.5)
        assert_alike(step(twin, X), step(by_hand(model, 0.5), X))
        assert_alike(step(mm, X), expected)
    assert isinstance(mm, LayerDrop)


def test_gammas_of_single_blocks() -> None:
    """Where gamma is 0 the velocity is f(x) afterwards, and cannot be undone."""
    model = Never()
    mm, hand = mfx.momentumize(model, {"blocks.[13]": 0.9, "*": 0.0}, example_inputs=X), by_hand(model, 0.9)
    for number in (0, 2, 4):
        hand.blocks[number].gamma = 0.0
    assert_alike(step(mm, X), step(hand, X))


def test_a_block_by_itself_is_an_error_and_at_gamma_0_the_plain_block() -> None:
    model = Never()
    mm, x = mfx.momentumize(model, 0.9, example_inputs=X), rows(3, 5, 6)
    model.eval(), mm.eval()
    with pytest.raises(mfx.EntryError, match=r"'blocks\.1' is one of the blocks that the model runs as a chain"):
        mm.blocks[1](x)
    mfx.set_gamma(mm, 0.0)
    torch.testing.assert_close(mm.blocks[1](x), model.blocks[1](x))


def test_without_an_example_the_error_asks_for_one() -> None:
    with pytest.raises(mfx.CaptureError, match="example_inputs="):
        mfx.momentumize(LayerDrop(), 0.9)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"velocity": "first"}, "velocity='first'"), ({"activation_budget": 0.5}, "activation_budget=")],
)
def test_what_has_to_be_known_before_a_call_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(mfx.CaptureError, match=match):
        mfx.momentumize(LayerDrop(), 0.9, example_inputs=X, **options)


def test_the_report_says_which_chains_are_linked() -> None:
    found = mfx.report(Never(block=Layer), X)
    assert found.rewritable == [f"blocks.{number}#{half}" for number in range(5) for half in (0, 1)]
    (link,) = found.links
    assert (link.scope, link.chains) == ("", (0, 1, 2, 3, 4))
    assert link.state_bytes == 2 * 3 * 5 * 6 * 8
    assert "chains 0, 1, 2, 3, 4 are linked while the model's forward runs" in str(found)
    assert "has no momentum" not in str(found)
    assert found.memory is not None
    assert found.memory.after < found.memory.before


def test_verify_compares_a_linked_model() -> None:
    found = mfx.verify(Never(block=Layer), X)
    assert found.ok, found
    assert len(found.chains) == 5


def test_what_is_compiled_around_it_runs_the_links_eagerly() -> None:
    torch._dynamo.reset()
    model = LayerDrop()
    mm = mfx.momentumize(model, 0.9, example_inputs=X)
    assert_alike(step(torch.compile(mm, backend="eager"), X), step(by_hand(model, 0.9), X))
    with pytest.raises(Exception, match=r"blocks that its model's own Python runs"):
        torch.compile(mm.blocks[0], backend="eager")(rows(3, 5, 6))


class Clamped(Layer):
    """As transformers do in training: what is not finite is clamped in the layer's last line."""

    def forward(self, x: Tensor) -> Tensor:
        return self.clamped(super().forward(x))

    def clamped(self, x: Tensor) -> Tensor:
        if self.training and not torch.isfinite(x).all():
            x = torch.clamp(torch.nan_to_num(x), min=-9, max=9)
        return x


class Plain(Model):
    """The blocks one after another."""

    def through(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@GAMMAS
def test_values_that_are_clamped_where_they_are_not_finite(gamma: float) -> None:
    """Both ways are right, draws included; after a clamp a chain begins."""

    class Stand(StandIn):
        def forward(self, x: Tensor) -> Tensor:
            return self.block.clamped(super().forward(x))

    model = Plain(block=Clamped)
    mm, hand, chain = mfx.momentumize(model, gamma, example_inputs=X), by_hand(model, gamma), Chain()
    assert set(parts_of(mm)) == {f"blocks.{number}" for number in range(5)}
    hand.blocks = nn.ModuleList(Stand(block, chain, gamma) for block in model.blocks)
    endless = X.clone()
    endless[0, 0, 0] = float("inf")
    for x in (X, endless, X):
        got, expected = step(mm, x), step(hand, x)
        torch.testing.assert_close(got[:2], expected[:2], equal_nan=True)
        assert torch.equal(got[2], expected[2])
    twin = pickle.loads(pickle.dumps(mm))
    assert_alike(step(twin, X), step(hand, X))


class OfSpeech(nn.Module):
    """The recurrence over one layer of wav2vec2, which is post-norm."""

    def __init__(self, layer: Any, chain: Chain, gamma: float) -> None:
        super().__init__()
        self.layer, self.chain, self.gamma = layer, chain, gamma

    def forward(self, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        layer, v = self.layer, self.chain.v if x is self.chain.x else 0.0
        attended = layer.attention(x, attention_mask=attention_mask)[0]
        v = self.gamma * v + (1 - self.gamma) * (layer.layer_norm(x + layer.dropout(attended)) - x)
        x = x + v
        v = self.gamma * v + (1 - self.gamma) * (layer.final_layer_norm(x + layer.feed_forward(x)) - x)
        self.chain.x, self.chain.v = x + v, v
        return self.chain.x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_wav2vec2_drops_layers_as_it_does(gamma: float) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    front = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
    other = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.4}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **front, **other)).double().train()
    x = rows(2, 400)
    mm, hand, chain = mfx.momentumize(model, gamma, example_inputs=x), copy.deepcopy(model), Chain()
    assert mfx.report(model, x).links[0].scope == "encoder"
    layers = [OfSpeech(layer, chain, gamma) for layer in hand.encoder.layers]
    if gamma:
        hand.encoder.layers = nn.ModuleList(layers)

    def loss(out: Any) -> Tensor:
        return out.last_hidden_state.square().sum()

    for seed in (1, 2, 3):
        got, expected = step(mm, x, seed=seed, loss=loss), step(hand, x, seed=seed, loss=loss)
        assert_alike((got[0].last_hidden_state, *got[1:]), (expected[0].last_hidden_state, *expected[1:]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_whisper_drops_layers_of_both_its_stacks() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "num_mel_bins": 8, "vocab_size": 60}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    other = {"max_source_positions": 20, "max_target_positions": 20, "encoder_layerdrop": 0.4, "decoder_layerdrop": 0.4}
    model = transformers.WhisperModel(transformers.WhisperConfig(**sizes, **ends, **other)).double().train()
    inputs = {
        "input_features": rows(2, 8, 40),
        "decoder_input_ids": torch.arange(4, 14).reshape(2, 5),
        "use_cache": False,
    }
    found = mfx.report(model, inputs)
    assert {link.scope for link in found.links} == {"encoder", "decoder"}

    def result(net: nn.Module, seed: int) -> Step:
        class Called(nn.Module):
            def forward(self) -> Tensor:
                return net(**inputs).last_hidden_state

        called = Called()
        called.net = net
        return step(called, seed=seed)

    at_zero = mfx.momentumize(model, 0.0, example_inputs=inputs)
    stored = mfx.momentumize(model, 0.9, example_inputs=inputs, reversible=False)
    mm = mfx.momentumize(model, 0.9, example_inputs=inputs)
    for seed in (1, 2):
        assert_alike(result(at_zero, seed), result(model, seed))
        assert_alike(result(mm, seed), result(stored, seed))


@pytest.mark.skipif(allocated_bytes() is None, reason="the C library's allocator cannot be asked")
@pytest.mark.parametrize("block", [Block, Layer])
def test_bytes_alive_do_not_grow_with_depth(block: type[Block]) -> None:
    """Two states, whatever the depth, and what autograd and the generator need for a node of each block."""
    x, alive = rows(16, 64, 4).float(), []
    for depth in (6, 24, 48):
        model = Never(depth, block, width=32).float()
        mm = mfx.momentumize(model, 0.9, example_inputs=x)
        found = [step_bytes(lambda mm=mm: mm(x), lambda y: y.sum().backward()) for _ in range(4)]
        alive.append(min(one.after_forward for one in found[1:] if one is not None))
        assert min(one.after_backward for one in found[1:] if one is not None) < 1 << 14
    state = 16 * 64 * 32 * 4
    assert alive[1] - alive[0] < 3 * state + 18 * 12000  # in float64 then, and no longer the memory of what is returned
    assert alive[2] - alive[1] < 24 * 12000
