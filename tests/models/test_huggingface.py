"""Hugging Face models, whose Python only Dynamo can follow, with tiny random configurations.

The recurrences are written by hand over the parts of each layer: the hand-made layers stand in the model's own
place, so embeddings, masks and heads are the model's.  Float64, train mode, dropout alive under one seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import assert_same, chain_names, relative_error, run
from sharded import process_group, whole
from torch import Tensor, nn

import mfx

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

GAMMA = 0.8
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Recurrence:
    """x and v of one chain, started anew by the first layer."""

    def __init__(self) -> None:
        self.v: Any = 0.0

    def step(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """One block."""
        self.v = GAMMA * self.v + (1 - GAMMA) * f(x)
        return x + self.v


class HandMade(nn.Module):
    """Stands for a layer; the first of a stack starts the chain."""

    def __init__(self, layer: Any, chain: Recurrence, first: bool) -> None:
        super().__init__()
        self.layer, self.chain, self.first = layer, chain, first

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's value."""
        if self.first:
            self.chain.v = 0.0
        return self.blocks(x, *args, **kwargs)


class GPT2(HandMade):
    def blocks(self, x: Tensor, past: Any = None, mask: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
        m, kwargs = self.layer, {key: value for key, value in kwargs.items() if "encoder" not in key}
        x = self.chain.step(x, lambda x: m.attn(m.ln_1(x), past_key_values=past, attention_mask=mask, **kwargs)[0])
        return self.chain.step(x, lambda x: m.mlp(m.ln_2(x)))


class Llama(HandMade):
    def blocks(self, x: Tensor, **kwargs: Any) -> Tensor:
        m = self.layer
        x = self.chain.step(x, lambda x: m.self_attn(hidden_states=m.input_layernorm(x), **kwargs)[0])
        return self.chain.step(x, lambda x: m.mlp(m.post_attention_layernorm(x)))


class Bert(HandMade):
    def blocks(self, x: Tensor, mask: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("past_key_values", None)
        x = self.chain.step(x, lambda x: self.layer.attention(x, mask, **kwargs)[0] - x)
        return self.chain.step(x, lambda x: self.layer.feed_forward_chunk(x) - x)


class T5(HandMade):
    def blocks(
        self,
        x: Tensor,
        mask: Any = None,
        bias: Any = None,
        memory: Any = None,
        memory_mask: Any = None,
        cross_bias: Any = None,
        **kwargs: Any,
    ) -> Any:
        attention, *cross, last = self.layer.layer
        kept: list[Any] = [None, None]

        def attend(x: Tensor) -> Tensor:
            inner = attention.SelfAttention(attention.layer_norm(x), mask=mask, position_bias=bias, **kwargs)
            kept[0] = inner[1]
            return attention.dropout(inner[0])

        x = self.chain.step(x, attend)
        for part in cross:

            def across(x: Tensor, part: Any = part) -> Tensor:
                inner = part.EncDecAttention(
                    part.layer_norm(x), mask=memory_mask, key_value_states=memory, position_bias=cross_bias, **kwargs
                )
                kept[1] = inner[1]
                return part.dropout(inner[0])

            x = self.chain.step(x, across)
        x = self.chain.step(x, lambda x: last.dropout(last.DenseReluDense(last.layer_norm(x))))
        return x, *kept


class ViT(HandMade):
    def blocks(self, x: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        m = self.layer
        x = self.chain.step(x, lambda x: m.dropout(m.attention(m.layernorm_before(x), mask, **kwargs)[0]))
        return self.chain.step(x, lambda x: m.dropout(m.mlp(m.layernorm_after(x))))


def words(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 50, (batch, length))


def padded() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": words(), "attention_mask": mask, "labels": words()}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, attention_dropout=0.1, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, use_cache=False
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    small = {key: SMALL[key] for key in list(SMALL)[1:5]}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, **small, **dropout)
    )


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64), "labels": torch.tensor([0, 1])}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], type[HandMade], list[str], int]] = {
    "gpt2": (gpt2, lambda: {"input_ids": words(), "labels": words()}, GPT2, ["transformer.h"], 6),
    "llama": (llama, padded, Llama, ["model.layers"], 6),
    "bert": (bert, padded, Bert, ["bert.encoder.layer"], 6),
    "t5": (t5, padded, T5, ["encoder.block", "decoder.block"], 10),
    "vit": (vit, pictures, ViT, ["vit.layers"], 6),
}


def made(make: Callable[[], nn.Module]) -> Any:
    """In float64 and train mode, all parameters random."""
    model = make().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def by_hand(model: Any, layer: type[HandMade], stacks: Iterable[str]) -> Any:
    """The model with hand-made layers, sharing its parameters."""
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for path in stacks:
        owner, _, name = path.rpartition(".")
        chain = Recurrence()
        stack = twin.get_submodule(path)
        layers = [layer(inner, chain, index == 0) for index, inner in enumerate(stack)]
        setattr(twin.get_submodule(owner), name, nn.ModuleList(layers))
    return twin


def result(model: nn.Module, inputs: dict[str, Tensor], parameters: dict[str, Tensor]) -> Any:
    """Loss and logits, the gradients of ``parameters``, the generator's end state."""
    torch.manual_seed(0)
    output = model(**inputs)
    state = torch.get_rng_state()
    loss = output.loss + output.logits.square().mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {"loss": loss, "logits": output.logits}, dict(zip(parameters, gradients, strict=True)), state


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_the_recurrence_written_by_hand(name: str) -> None:
    make, inputs, layer, stacks, blocks = MODELS[name]
    model, call = made(make), inputs()
    parameters = dict(model.named_parameters())
    expected = result(by_hand(model, layer, stacks), call, parameters)
    for reversible in (True, False):
        mm = mfx.momentumize(model, GAMMA, example_inputs=call, reversible=reversible)
        assert sum(map(len, chain_names(mm))) == blocks
        outputs, gradients, state = result(mm, call, parameters)
        assert relative_error(outputs, expected[0]) < 1e-10
        assert relative_error(gradients, expected[1]) < 1e-10
        assert torch.equal(state, expected[2])


@pytest.mark.parametrize("name", MODELS)
def test_at_gamma_zero_models_are_the_original(name: str) -> None:
    make, inputs, *_ = MODELS[name]
    model, call = made(make), inputs()
    mm = mfx.momentumize(model, 0.0, example_inputs=call)
    assert type(mm(**call)) is type(model(**call))
    assert_same(run(mm, **call), run(model, **call))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_generating_with_a_cache_equals_generating_without(make: Callable[[], nn.Module]) -> None:
    model, prompt = made(make), words(2, 4)
    mm = mfx.momentumize(model, GAMMA, example_inputs={"input_ids": words(), "labels": words()})
    mm.eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = mm.generate(prompt, use_cache=True, **settings)
    assert torch.equal(tokens, mm.generate(prompt, use_cache=False, **settings))
    with torch.no_grad():
        whole = mm(input_ids=prompt).logits
        first = mm(input_ids=prompt[:, :3], use_cache=True)
        second = mm(input_ids=prompt[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    assert relative_error([first.logits, second.logits], [whole[:, :3], whole[:, 3:]]) < 1e-10
    assert first.past_key_values.get_seq_length() == 4


def test_cached_generation_at_gamma_zero_is_the_originals() -> None:
    model, prompt = made(gpt2).eval(), words(2, 4)
    mm = mfx.momentumize(model, 0.0, example_inputs={"input_ids": prompt})
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    assert torch.equal(mm.generate(prompt, **settings), model.generate(prompt, **settings))


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("gamma", [0.0, GAMMA])
def test_gradients_by_keys_and_values_of_a_cache_in_training(make: Callable[[], nn.Module], gamma: float) -> None:
    """Whole: a layer's keys are read by its own attention too."""
    model, call = made(make), {"input_ids": words(), "labels": words(), "use_cache": True}

    def gradients(of: nn.Module) -> Any:
        torch.manual_seed(0)
        out = of(**call)
        cache = [value for layer in out.past_key_values.layers for value in (layer.keys, layer.values)]
        loss = out.loss + cache[2].square().sum()
        found = torch.autograd.grad(loss, [*cache, *model.parameters()], allow_unused=True)
        assert all(grad is not None and grad.norm() > 0 for grad in found[: len(cache)])
        return found

    plain = model if gamma == 0 else mfx.momentumize(model, gamma, example_inputs=call, reversible=False)
    ours, theirs = gradients(mfx.momentumize(model, gamma, example_inputs=call)), gradients(plain)
    assert max(relative_error([one], [other]) for one, other in zip(ours[:6], theirs[:6], strict=True)) < 1e-10
    assert relative_error(ours, theirs) < 1e-10


def test_attention_weights_are_handed_out_with_their_gradients() -> None:
    model, call = made(bert), padded()
    model.set_attn_implementation("eager")
    call["output_attentions"] = True

    def gradients(of: nn.Module) -> Any:
        torch.manual_seed(0)
        out = of(**call)
        loss = out[0].square().sum() + sum(weight.square().sum() for weight in out.attentions)
        return torch.autograd.grad(loss, [*out.attentions, *model.parameters()], allow_unused=True)

    model(**call)
    reversible, stored = (mfx.momentumize(model, GAMMA, example_inputs=call, reversible=r) for r in (True, False))
    assert relative_error(gradients(reversible), gradients(stored)) < 1e-10
    assert relative_error(gradients(mfx.momentumize(model, 0.0, example_inputs=call)), gradients(model)) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_language_model_that_is_sharded_by_layer(order: str, tmp_path):
    """fully_shard of each layer and of the model: what a layer is given goes through its call in Dynamo's graph."""
    from torch.distributed.fsdp import fully_shard

    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    layers = "model.layers.[0-9]"

    def made() -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, use_cache=False)).double()

    def sharded(model: nn.Module) -> nn.Module:
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer)  # type: ignore[arg-type]
        return fully_shard(model)

    def momentum(model: nn.Module, modules: Any = layers) -> nn.Module:
        return mfx.momentumize(model, GAMMA, example_inputs={"input_ids": ids}, modules=modules)

    expected = momentum(made())
    expected(input_ids=ids).logits.square().sum().backward()
    with process_group(tmp_path):
        mm = momentum(sharded(made()), None) if order == "before" else sharded(momentum(made()))
        for _ in range(2):
            mm.zero_grad()
            mm(input_ids=ids).logits.square().sum().backward()
        grads = [None if p.grad is None else whole(p.grad) for p in mm.parameters()]
        assert relative_error(grads, [p.grad for p in expected.parameters()]) < 1e-9
