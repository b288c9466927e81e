"""Every torchvision classification model in its own depth and structure, but narrow and for small images.

torchvision's builders do the building; only the class that they call at the end is given smaller widths.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, get_model_builder
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

NAMES = torchvision.models.list_models(module=torchvision.models)


def full(name: str) -> nn.Module:
    """The model in full size, its parameters without memory: for questions about structure."""
    with _ParametersWithoutMemory():
        return _build(name)


def small(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A narrow float64 model with random parameters, and a batch that is large enough for its BatchNorm.

    BatchNorm's running statistics are those of the batch, as after training: with the initial ones, activations
    in eval mode grow from block to block without bound, and no gradient of a deep model is well conditioned.
    """
    with _narrow_classes(name):
        model = _build(name)
    if name == "alexnet":
        model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256 * 36, 10))
    size = 96 if name in ("alexnet", "inception_v3") else 64
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    return _with_statistics(randomized(model), images), images


def randomized(model: nn.Module) -> nn.Module:
    """The model in float64 with every parameter moved a little: none is zero, no scale is tiny."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _with_statistics(model: nn.Module, images: torch.Tensor) -> nn.Module:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def _build(name: str) -> nn.Module:
    given: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "inception_v3":
        given["aux_logits"] = False  # its auxiliary head needs images of 299 pixels
    return get_model(name, weights=None, **given)


class _ParametersWithoutMemory(TorchFunctionMode):
    """Puts ``torch.empty``, with which modules make their parameters, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}
        return func(*args, **kwargs)


@contextlib.contextmanager
def _narrow_classes(name: str) -> Iterator[None]:
    """While active, the module of a model's builder has the narrow form of the model's class."""
    module = sys.modules[get_model_builder(name).__module__]
    with contextlib.ExitStack() as stack:
        for class_name, narrow in _NARROW.items():
            original = getattr(module, class_name, None)
            if original is not None and original.__module__ == module.__name__:
                stack.enter_context(mock.patch.object(module, class_name, functools.partial(narrow, original)))
        yield


def _resnet(original: Any, block: Any, layers: Any, groups: int = 1, width_per_group: int = 64, **given: Any) -> Any:
    width = width_per_group if block is BasicBlock else max(width_per_group // (32 if groups > 1 else 8), 1)
    return original(block, layers, groups=groups, width_per_group=width, **given)


def _convnext(original: Any, stages: Any, **given: Any) -> Any:
    for stage in stages:
        stage.input_channels //= 16
        stage.out_channels = stage.out_channels and stage.out_channels // 16
    return original(stages, **given)


def _efficientnet(original: Any, stages: Any, dropout: float, **given: Any) -> Any:
    narrow = [
        replace(stage, input_channels=_eighth(stage.input_channels), out_channels=_eighth(stage.out_channels))
        for stage in stages
    ]
    return original(narrow, dropout, **given)


def _eighth(channels: int) -> int:
    return 8 * -(-channels // 64)


def _regnet(original: Any, stages: Any, **given: Any) -> Any:
    stages.widths = [8 * (index + 1) for index in range(len(stages.widths))]
    stages.group_widths = [8] * len(stages.widths)
    return original(stages, stem_width=8, **given)


def _vgg(original: Any, features: nn.Sequential, **given: Any) -> Any:
    layers = [layer for layer in features if isinstance(layer, (nn.Conv2d, nn.MaxPool2d))]
    widths = [getattr(layer, "out_channels", 0) // 16 for layer in layers]
    norm = any(isinstance(layer, nn.BatchNorm2d) for layer in features)
    model = original(make_layers([width or "M" for width in widths], norm), init_weights=False, num_classes=10)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(widths[-2] * 49, 10))
    return model


def _swin(original: Any, num_heads: list[int], **given: Any) -> Any:
    return original(num_heads=num_heads, **{**given, "embed_dim": 4 * num_heads[0], "window_size": [4, 4]})


_NARROW: dict[str, Any] = {
    "ResNet": _resnet,
    "ConvNeXt": _convnext,
    "EfficientNet": _efficientnet,
    "RegNet": _regnet,
    "VGG": _vgg,
    "SwinTransformer": _swin,
    "DenseNet": lambda original, growth, layers, width, **given: original(4, layers, 8, **given),
    "MNASNet": lambda original, alpha, **given: original(0.25, **given),
    "MobileNetV2": lambda original, **given: original(width_mult=0.25, **given),
    "VisionTransformer": lambda original, **given: original(
        **{**given, "image_size": 64, "patch_size": 16, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}, dropout=0.1
    ),
    "MaxVit": lambda original, block_channels, **given: original(
        block_channels=[16, 16, 24, 32],
        **{**given, "stem_channels": 8, "head_dim": 8, "input_size": (64, 64), "partition_size": 2},
    ),
}
