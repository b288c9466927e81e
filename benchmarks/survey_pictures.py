"""Small configurations of models on pictures and volumes, of libraries that people install beside torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from survey_building import Made, of, shaped

ALIVE = {"dropout": 0.1, "emb_dropout": 0.1}


VIT = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "heads": 2, "mlp_dim": 64}


def vit(name: str, **given: Any) -> Callable[[], Made]:
    """A model of vit-pytorch that takes the arguments of its ViT."""
    return of(f"vit_pytorch.{name}", shaped(2, 3, 32, 32), **{**VIT, "depth": 6, **given})


def open_clip() -> Made:
    from open_clip.model import CLIP

    sizes = {"layers": 6, "width": 32, "head_width": 16}
    net = CLIP(
        embed_dim=16,
        vision_cfg={**sizes, "image_size": 32, "patch_size": 8},
        text_cfg={"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 6},
    )
    return net, (torch.randn(2, 3, 32, 32), torch.randint(1, 100, (2, 12)))


def coca() -> Made:
    from open_clip.coca_model import CoCa

    net = CoCa(
        embed_dim=32,
        multimodal_cfg={"width": 32, "context_length": 12, "vocab_size": 100, "heads": 2, "layers": 6},
        text_cfg={
            "context_length": 12,
            "vocab_size": 100,
            "width": 32,
            "heads": 2,
            "layers": 6,
            "embed_cls": True,
            "output_tokens": True,
        },
        vision_cfg={
            "layers": 6,
            "width": 32,
            "head_width": 16,
            "image_size": 32,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
    )
    return net, (torch.randn(2, 3, 32, 32), torch.randint(1, 100, (2, 12)))


def segment_anything() -> Made:
    from segment_anything.modeling import ImageEncoderViT

    net = ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=32, depth=6, num_heads=2, out_chans=16, window_size=4,
        use_rel_pos=True, global_attn_indexes=(2, 5),
    )  # fmt: skip
    return net, (torch.randn(2, 3, 64, 64),)


def two_way_decoder() -> Made:
    from segment_anything.modeling import TwoWayTransformer

    net = TwoWayTransformer(depth=6, embedding_dim=32, num_heads=2, mlp_dim=64)
    return net, (torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8), torch.randn(2, 5, 32))


MODELS: dict[str, Callable[[], Made]] = {
    "vit-pytorch ViT": vit("ViT", **ALIVE),
    "vit-pytorch SimpleViT": vit("SimpleViT"),
    "vit-pytorch DeepViT": vit("deepvit.DeepViT", **ALIVE),
    "vit-pytorch CaiT": vit("cait.CaiT", **ALIVE, cls_depth=2, layer_dropout=0.0),
    "vit-pytorch CaiT, layer dropout": vit("cait.CaiT", **ALIVE, cls_depth=2, layer_dropout=0.1),
    "vit-pytorch parallel ViT": vit("parallel_vit.ViT", **ALIVE, num_parallel_branches=2),
    "vit-pytorch ViT for small data sets": vit("vit_for_small_dataset.ViT", **ALIVE),
    "vit-pytorch ViT, patch merger": vit("vit_with_patch_merger.ViT", **ALIVE, patch_merge_layer=3),
    "vit-pytorch XCiT": vit("xcit.XCiT", cls_depth=2, **ALIVE),
    "vit-pytorch NormalizedViT": vit("normalized_vit.nViT"),
    "vit-pytorch CvT": of("vit_pytorch.cvt.CvT", shaped(2, 3, 64, 64), num_classes=5, dropout=0.1),
    "vit-pytorch MaxViT": of(
        "vit_pytorch.max_vit.MaxViT",
        shaped(2, 3, 64, 64),
        num_classes=5,
        dim=16,
        depth=(2, 2),
        dim_head=8,
        dim_conv_stem=16,
        window_size=8,
        dropout=0.1,
    ),  # fmt: skip,
    "vit-pytorch CCT": of(
        "vit_pytorch.cct.CCT",
        shaped(2, 3, 32, 32),
        img_size=32,
        embedding_dim=32,
        n_conv_layers=2,
        kernel_size=3,
        stride=1,
        padding=1,
        pooling_kernel_size=3,
        pooling_stride=2,
        pooling_padding=1,
        num_layers=6,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=5,
    ),  # fmt: skip,
    "vit-pytorch ViViT": of(
        "vit_pytorch.vivit.ViViT",
        shaped(2, 3, 4, 32, 32),
        image_size=32,
        image_patch_size=8,
        frames=4,
        frame_patch_size=2,
        num_classes=5,
        dim=32,
        spatial_depth=4,
        temporal_depth=4,
        heads=2,
        mlp_dim=64,
        **ALIVE,
    ),  # fmt: skip,
    "open_clip CLIP": open_clip,
    "open_clip CoCa": coca,
    "segment-anything encoder": segment_anything,
    "segment-anything two-way decoder": two_way_decoder,
    "MONAI ViT": of(
        "monai.networks.nets.ViT",
        shaped(1, 1, 16, 16, 16),
        1,
        (16, 16, 16),
        (8, 8, 8),
        hidden_size=32,
        mlp_dim=64,
        num_layers=6,
        num_heads=2,
        dropout_rate=0.1,
        classification=True,
        num_classes=3,
    ),  # fmt: skip,
    "MONAI UNETR": of(
        "monai.networks.nets.UNETR",
        shaped(1, 1, 32, 32, 32),
        1,
        2,
        (32, 32, 32),
        feature_size=8,
        hidden_size=32,
        mlp_dim=64,
        num_heads=2,
        dropout_rate=0.1,
    ),  # fmt: skip,
    "MONAI SegResNet": of(
        "monai.networks.nets.SegResNet",
        shaped(1, 1, 16, 16, 16),
        init_filters=8,
        dropout_prob=0.1,
        blocks_down=(2, 2, 2, 4),
        blocks_up=(2, 2, 2),
    ),  # fmt: skip,
    "MONAI Restormer": of(
        "monai.networks.nets.restormer.Restormer",
        shaped(1, 3, 32, 32),
        in_channels=3,
        out_channels=3,
        dim=16,
        num_blocks=(3, 3),
        heads=(1, 2),
        num_refinement_blocks=3,
    ),  # fmt: skip,
    "MONAI diffusion U-Net": of(
        "monai.networks.nets.DiffusionModelUNet",
        lambda: (torch.randn(1, 1, 16, 16), torch.tensor([3])),
        2,
        1,
        1,
        num_res_blocks=4,
        channels=(16, 32),
        attention_levels=(False, True),
        norm_num_groups=8,
        num_head_channels=8,
    ),  # fmt: skip,
    "MONAI MedNeXt": of(
        "monai.networks.nets.MedNeXt",
        shaped(1, 1, 32, 32, 32),
        init_filters=8,
        blocks_down=(3, 3),
        blocks_bottleneck=3,
        blocks_up=(3, 3),
    ),  # fmt: skip,
}
