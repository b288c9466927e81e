"""M1, M2: momentum nets written out by hand, from a model's own submodules and plain autograd, against the pass.

Train mode, dropout and stochastic depth alive under one seed, float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, run
from small_models import randomized
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import mfx

Branches = Iterable[tuple[str, Callable[[Tensor], Tensor]]]


class ByHand:
    """The recurrence v <- gamma v + (1 - gamma) f(x), x <- x + v; each call is one chain."""

    def __init__(self, model: nn.Module, gamma: Any, velocity: Any) -> None:
        self.model, self.gamma, self.velocity = model, gamma, velocity
        self.chains = 0

    def __call__(self, x: Tensor, branches: Branches) -> Tensor:
        v: Any = 0.0
        if callable(self.velocity):
            v = self.model.momentum_velocity[str(self.chains)](x)
        for index, (name, f) in enumerate(branches):
            gamma = self.gamma_of(name)
            if self.velocity == "first" and index == 0:
                gamma = 0.0  # gamma v_0 + (1 - gamma) f(x) is f(x), where v_0 = f(x)
            v = gamma * v + (1 - gamma) * f(x)
            x = x + v
        self.chains += 1
        return x

    def gamma_of(self, name: str) -> float:
        """The first pattern that matches."""
        if isinstance(self.gamma, float):
            return self.gamma
        return next(value for pattern, value in self.gamma.items() if fnmatchcase(name, pattern))


class PreActivation(nn.Module):
    """A pre-activation ResNet with functional calls, and adds in every way people write them."""

    def __init__(self, depth: int = 5, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def branch(self, index: int, x: Tensor) -> Tensor:
        x = F.relu(self.norms[index](x), inplace=True)
        return F.dropout2d(self.convs[index](x), 0.2, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.branch(0, x)
        y = self.branch(1, x)
        y += x
        z = self.branch(2, y).add_(y)
        z = torch.add(z, self.branch(3, z), alpha=0.5)
        z = z - self.branch(4, z)
        return self.head(F.relu_(z).mean((2, 3)))


def preactivation_by_hand(model: PreActivation, momentum: ByHand, x: Tensor) -> Tensor:
    scales = (1, 1, 1, 0.5, -1)
    x = momentum(
        model.stem(x),
        [(f"#{i}", lambda x, i=i, scale=scale: scale * model.branch(i, x)) for i, scale in enumerate(scales)],
    )
    return model.head(F.relu(x).mean((2, 3)))


def resnet_by_hand(model: Any, momentum: ByHand, x: Tensor) -> Tensor:
    def wrapped(name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        block = model.get_submodule(name)
        return name, lambda x: F.relu(x + block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))) - x

    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    x = momentum(x, [wrapped("layer1.0"), wrapped("layer1.1")])
    for layer in ("layer2", "layer3", "layer4"):
        x = model.get_submodule(f"{layer}.0")(x)  # its shortcut is a convolution: a plain block
        x = momentum(x, [wrapped(f"{layer}.1")])
    return model.fc(torch.flatten(model.avgpool(x), 1))


def vit_by_hand(model: Any, momentum: ByHand, x: Tensor) -> Tensor:
    def branches() -> Branches:
        for name, layer in model.encoder.layers.named_children():

            def attend(x: Tensor, layer: Any = layer) -> Tensor:
                x = layer.ln_1(x)
                return layer.dropout(layer.self_attention(x, x, x, need_weights=False)[0])

            yield f"encoder.layers.{name}#0", attend
            yield f"encoder.layers.{name}#1", lambda x, layer=layer: layer.mlp(layer.ln_2(x))

    x = model._process_input(x)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1)
    x = momentum(model.encoder.dropout(x + model.encoder.pos_embedding), branches())
    return model.heads(model.encoder.ln(x)[:, 0])


def swin_by_hand(model: Any, momentum: ByHand, x: Tensor) -> Tensor:
    def branches(stage: int) -> Branches:
        for index, block in enumerate(model.features[stage]):
            drop = block.stochastic_depth
            yield f"features.{stage}.{index}#0", lambda x, b=block, drop=drop: drop(b.attn(b.norm1(x)))
            yield f"features.{stage}.{index}#1", lambda x, b=block, drop=drop: drop(b.mlp(b.norm2(x)))

    x = model.features[0](x)
    x = momentum(x, branches(1))
    x = momentum(model.features[2](x), branches(3))
    return model.head(model.norm(x).mean((1, 2)))


def prelu(chain: Any) -> nn.Module:
    """A learned velocity, of another value for each chain."""
    return nn.PReLU(init=0.1 * (1 + chain.index), dtype=torch.float64)


def make_vit() -> nn.Module:
    return VisionTransformer(
        16, 8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, dropout=0.1, attention_dropout=0.1
    )


def make_swin() -> nn.Module:
    return SwinTransformer(
        [2, 2], 8, [2, 4], [2, 4], [4, 4], dropout=0.1, attention_dropout=0.1, stochastic_depth_prob=0.3
    )


MODELS = {
    "resnet18": (resnet18, resnet_by_hand, 32, {"layer1.0": 0.9, "layer1.*": 0.5, "*": 0.3}),
    "vit": (make_vit, vit_by_hand, 16, {"*#0": 0.9, "*layer_1#1": 0.0, "*#1": 0.6}),
    "swin": (make_swin, swin_by_hand, 16, {"features.1.*": 0.2, "*#1": 0.95, "*": 0.8}),
    "preactivation": (PreActivation, preactivation_by_hand, 6, {"#[01]": 0.8, "*": 0.4}),
}


@pytest.mark.parametrize("velocity", ["zero", "first", "learned"])
@pytest.mark.parametrize("gamma", [0.9, 0.5, "by name"])
@pytest.mark.parametrize("name", MODELS)
def test_the_pass_equals_the_recurrence_written_by_hand(name: str, gamma: Any, velocity: Any) -> None:
    make, forward, size, by_name = MODELS[name]
    model = randomized(make())
    images = torch.randn(4, 3, size, size, dtype=torch.float64, requires_grad=True)
    gamma = by_name if gamma == "by name" else gamma
    if velocity == "learned":
        velocity = prelu

    for reversible in (True, False):
        mm = mfx.momentumize(model, gamma, velocity=velocity, reversible=reversible)
        by_hand = copy.copy(mm)
        by_hand.forward = lambda x, mm=mm: forward(mm, ByHand(mm, gamma, velocity), x)
        assert_same(run(mm, images), run(by_hand, images))
