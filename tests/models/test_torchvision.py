"""Every classification model of torchvision: what is rewritten, and that it computes and trains as it should.

The plan is checked on all models in full size, everything else on narrow ones of the same depth (small_models.py), one
or two of a family.
"""

from __future__ import annotations

import pytest
import small_models
from helpers import assert_same, chain_names, run
from torch import nn
from torchvision.models import (
    convnext,
    efficientnet,
    maxvit,
    mnasnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    swin_transformer,
    vision_transformer,
)

import mfx

COUNTS = {
    "resnet18": 5,
    "resnet50": 12,
    "resnet101": 29,
    "resnet152": 46,
    "wide_resnet50_2": 12,
    "resnext50_32x4d": 12,
    "convnext_tiny": 18,
    "efficientnet_b0": 9,
    "efficientnet_v2_s": 35,
    "mobilenet_v2": 10,
    "mobilenet_v3_large": 10,
    "mnasnet1_0": 10,
    "regnet_y_400mf": 12,
    "swin_t": 24,
    "swin_v2_t": 24,
    "vit_b_16": 24,
    # 44 halves of attention layers, and the 7 MBConv blocks whose shortcut is nn.Identity.
    "maxvit_t": 51,
    "densenet121": 0,
    "vgg16": 0,
    "alexnet": 0,
    "googlenet": 0,
    "shufflenet_v2_x1_0": 0,
    "squeezenet1_0": 0,
}


ALIKE = {"resnet101", "resnet152", "wide_resnet50_2", "efficientnet_v2_s", "swin_v2_t", "vgg16", "alexnet"}
"""What runs as another that is run does."""


def _blocks_of(module: nn.Module) -> int:
    """How many residual adds with an untransformed skip a module of torchvision's runs itself."""
    match module:
        case resnet.BasicBlock() | resnet.Bottleneck():
            return int(module.downsample is None)
        case regnet.ResBottleneckBlock():
            return int(module.proj is None)
        case efficientnet.MBConv() | efficientnet.FusedMBConv():
            return int(module.use_res_connect)
        case mobilenetv2.InvertedResidual() | mobilenetv3.InvertedResidual():
            return int(module.use_res_connect)
        case mnasnet._InvertedResidual():
            return int(module.apply_residual)
        case maxvit.MBConv():
            return int(isinstance(module.proj, nn.Identity))
        case maxvit.PartitionAttentionLayer() | vision_transformer.EncoderBlock():
            return 2
        case swin_transformer.SwinTransformerBlock():
            return 2
        case convnext.CNBlock():
            return 1
    return 0


def _momentumized(model: nn.Module, **options: object) -> nn.Module:
    """``model`` rewritten; that nothing is rewritten is told exactly where the model has no block."""
    if any(map(_blocks_of, model.modules())):
        return mfx.momentumize(model, **options)
    with pytest.warns(mfx.NothingRewrittenWarning, match="nothing was rewritten"):
        return mfx.momentumize(model, **options)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_the_block_counts_of_well_known_models(name: str, count: int) -> None:
    assert len(mfx.report(small_models.full(name)).rewritable) == count


@pytest.mark.parametrize("name", small_models.NAMES)
def test_every_residual_add_with_a_plain_skip_is_rewritten_and_no_other(name: str) -> None:
    model = small_models.full(name)
    rewritable = mfx.report(model).rewritable
    assert len(rewritable) == sum(map(_blocks_of, model.modules()))
    assert [block for chain in chain_names(_momentumized(model)) for block in chain] == list(rewritable)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUNTS if name not in ALIKE])
def test_gamma_0_is_the_model_and_the_reversible_run_equals_the_stored_one(name: str) -> None:
    model, images = small_models.small(name)
    images.requires_grad_()
    plain = _momentumized(model, gamma=0.0)
    for training in (False, True):
        assert_same(run(plain.train(training), images), run(model.train(training), images))
    reversible, stored = (_momentumized(model, gamma=0.9, reversible=flag) for flag in (True, False))
    assert_same(run(reversible, images), run(stored, images))
