"""The models that are measured: stacks of blocks by depth, torchvision's, tiny language models, LoRA, accumulation.

Each :class:`Case` gives a model in train mode with a call of it; which of its modules a user would put a checkpoint
around; and, for stacks, the branches that momentumnet takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

DEPTHS = (6, 24, 96)


@dataclass(frozen=True)
class Sample:
    """A model in train mode, the arguments of a call, and what momentumnet would be given in its place."""

    model: nn.Module
    inputs: dict[str, Any]
    branches: Sequence[nn.Module] = ()

    def forward(self, model: nn.Module) -> tuple[Any, Tensor]:
        """The output of one call of ``model``, which a training loop holds, and a loss: its own, or a mean square."""
        output = model(**self.inputs)
        return output, output.loss if hasattr(output, "loss") else output.square().mean()

    def step(self, model: nn.Module) -> None:
        """One forward and backward; the output is alive until the end."""
        output, loss = self.forward(model)
        loss.backward()
        del output


@dataclass(frozen=True)
class Case:
    """What is measured: ``blocks`` are the classes that a checkpoint goes around, ``calls`` the calls in one step."""

    name: str
    make: Callable[[], Sample] = field(repr=False)
    blocks: tuple[str, ...]
    calls: int = 1


class Residual(nn.Module):
    """``x + f(x)``."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Attention(nn.Module):
    """Norm and self-attention with heads of 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def feed_forward(width: int, dropout: float = 0.0) -> nn.Sequential:
    """Norm and a feed-forward part of four times the width."""
    inner = [nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)]
    return nn.Sequential(nn.LayerNorm(width), *(part for part in inner if getattr(part, "p", 1.0) > 0))


def convolutions(width: int) -> nn.Sequential:
    """Two convolutions with batch norm."""
    layers = (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    again = (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(*layers, *again)


class TransformerBlock(nn.Sequential):
    """Attention and feed-forward part, two residual adds."""

    def __init__(self, width: int) -> None:
        super().__init__(Residual(Attention(width)), Residual(feed_forward(width)))


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def stack(make: Callable[[], nn.Module], depth: int, *shape: int) -> Sample:
    """A stack whose input, as the output of a stem would, needs a gradient."""
    model = Stack(*(make() for _ in range(depth))).train()
    branches = [module.branch for module in model.modules() if isinstance(module, Residual)]
    return Sample(model, {"x": torch.randn(shape, requires_grad=True)}, branches)


def mlp(depth: int) -> Sample:
    return stack(lambda: Residual(feed_forward(256, 0.1)), depth, 1024, 256)


def convolution(depth: int) -> Sample:
    return stack(lambda: Residual(convolutions(64)), depth, 16, 64, 16, 16)


def transformer(depth: int) -> Sample:
    return stack(lambda: TransformerBlock(256), depth, 8, 128, 256)


def vision(name: str, batch: int, size: int) -> Sample:
    """A model of torchvision's, without weights."""
    import torchvision

    options = {"image_size": size} if name.startswith("vit") else {}
    model = getattr(torchvision.models, name)(weights=None, **options).train()
    return Sample(model, {next(iter(signature(model.forward).parameters)): torch.randn(batch, 3, size, size)})


def _words(batch: int, length: int, words: int) -> dict[str, Tensor]:
    tokens = torch.randint(words, (batch, length))
    return {"input_ids": tokens, "labels": tokens}


def gpt2(layers: int = 8, width: int = 256, batch: int = 4, length: int = 128) -> Sample:
    """GPT-2 with dropout, random weights."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=2048, n_positions=length, use_cache=False
    )
    return Sample(transformers.GPT2LMHeadModel(config).train(), _words(batch, length, 2048))


def llama(layers: int = 8, width: int = 256, batch: int = 4, length: int = 128) -> Sample:
    """Llama, random weights."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=2048,
        use_cache=False,
    )
    return Sample(transformers.LlamaForCausalLM(config).train(), _words(batch, length, 2048))


class LoRA(nn.Module):
    """A frozen linear layer, and a low-rank one beside it that learns."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def lora() -> Sample:
    """Llama with a frozen base and LoRA in its query and value projections."""
    sample = llama()
    sample.model.requires_grad_(False)
    for module in list(sample.model.modules()):
        for name in ("q_proj", "v_proj"):
            if hasattr(module, name):
                setattr(module, name, LoRA(getattr(module, name)))
    return sample


_RESNET = ("BasicBlock", "Bottleneck")

CASES: tuple[Case, ...] = (
    *(Case(f"mlp {depth}", lambda depth=depth: mlp(depth), ("Residual",)) for depth in DEPTHS),
    *(Case(f"convolution {depth}", lambda depth=depth: convolution(depth), ("Residual",)) for depth in (6, 24, 64, 96)),
    *(Case(f"transformer {depth}", lambda depth=depth: transformer(depth), ("TransformerBlock",)) for depth in DEPTHS),
    Case("resnet50", lambda: vision("resnet50", 4, 96), _RESNET),
    Case("resnet101", lambda: vision("resnet101", 4, 96), _RESNET),
    Case("resnet152", lambda: vision("resnet152", 4, 96), _RESNET),
    Case("vit_b_16", lambda: vision("vit_b_16", 4, 96), ("EncoderBlock",)),
    Case("swin_t", lambda: vision("swin_t", 2, 128), ("SwinTransformerBlock",)),
    Case("convnext_tiny", lambda: vision("convnext_tiny", 2, 128), ("CNBlock",)),
    Case("gpt2", gpt2, ("GPT2Block",)),
    Case("llama", llama, ("LlamaDecoderLayer",)),
    Case("llama, LoRA", lora, ("LlamaDecoderLayer",)),
    Case("gpt2, 4 calls accumulated", gpt2, ("GPT2Block",), calls=4),
)
"""Every case, in the order of the tables."""
