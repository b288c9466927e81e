"""Small Hugging Face models, calls of them, and data for a Trainer."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
WORDS = torch.arange(32).view(4, 8)


def bert(layers: int = 3) -> nn.Module:
    """A BERT for two classes, dropout alive."""
    config = transformers.BertConfig(**SIZES, num_hidden_layers=layers, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def llama(layers: int = 3) -> nn.Module:
    """A Llama for language."""
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": layers, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **sizes))


BERT_CALL: dict[str, Any] = {
    "input_ids": WORDS,
    "attention_mask": torch.ones_like(WORDS),
    "labels": torch.tensor([0, 1, 0, 1]),
}
LLAMA_CALL: dict[str, Any] = {"input_ids": WORDS, "labels": WORDS, "use_cache": False}
MODELS = {"bert": (bert, BERT_CALL), "llama": (llama, LLAMA_CALL)}


class Sentences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random words; the label says whether the first one is of the upper half."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Any]:
        words = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": words, "attention_mask": torch.ones(8, dtype=torch.long), "labels": int(words[0] > 25)}


def step(model: nn.Module, call: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step, always with the same draws."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model.train()(**call).loss
    loss.backward()
    named = {name.rpartition("base_model.model.")[2]: p.grad for name, p in model.named_parameters()}
    return loss.detach(), {name: grad.clone() for name, grad in named.items() if grad is not None}
