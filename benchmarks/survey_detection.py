"""Small configurations of detectors with their targets, and of dense prediction, of libraries beside torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from survey_building import Made, of, shaped


def detection(name: str, masks: bool = False) -> Callable[[], Made]:
    """A detector of torchvision in training, with its targets."""

    def make() -> Made:
        from torchvision.models import detection

        sizes = {"min_size": 64, "max_size": 64}
        if "rcnn" in name:
            sizes |= {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}
        net = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=3, **sizes)
        targets = [
            {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1, 2])},
            {"boxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]]), "labels": torch.tensor([1])},
        ]
        if masks:
            for target in targets:
                target["masks"] = torch.randint(0, 2, (len(target["labels"]), 64, 64), dtype=torch.uint8)
        return net, ([torch.randn(3, 64, 64), torch.randn(3, 64, 64)], targets)

    return make


def detr(name: str, **given: Any) -> Callable[[], Made]:
    """A detector of transformers in training, with its labels; the losses are in its output."""

    def make() -> Made:
        import transformers

        config = getattr(transformers, f"{name}Config")(num_queries=8, num_labels=3, **given)
        boxes = [torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.3, 0.2, 0.2]]), torch.tensor([[0.5, 0.5, 0.6, 0.6]])]
        labels = [{"class_labels": torch.arange(len(each)), "boxes": each} for each in boxes]
        net = getattr(transformers, f"{name}ForObjectDetection")(config)
        return net, {"pixel_values": torch.randn(2, 3, 64, 64), "labels": labels}

    return make


def small_resnet(*stages: str) -> Any:
    from transformers import ResNetConfig

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [2] * 4, "layer_type": "basic"}
    return ResNetConfig(**sizes, out_features=list(stages))


DETR = {
    "d_model": 32,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def detr_plain() -> Made:
    return detr("Detr", **DETR, backbone_config=small_resnet("stage4"), use_timm_backbone=False)()


def conditional_detr() -> Made:
    return detr("ConditionalDetr", **DETR, backbone_config=small_resnet("stage4"), use_timm_backbone=False)()


def deformable_detr() -> Made:
    return detr(
        "DeformableDetr",
        **DETR,
        backbone_config=small_resnet("stage2", "stage3", "stage4"),
        use_timm_backbone=False,
        num_feature_levels=3,
        encoder_n_points=2,
        decoder_n_points=2,
    )()


def rt_detr() -> Made:
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[2] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return detr(
        "RTDetr",
        backbone_config=backbone,
        d_model=32,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 16],
        decoder_in_channels=[32, 32, 32],
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_layers=6,
        num_denoising=4,
    )()


def mask2former() -> Made:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=6,
        decoder_layers=7,
        num_attention_heads=2,
        dim_feedforward=64,
        num_queries=8,
        num_labels=3,
        train_num_points=64,
    )
    call = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "mask_labels": [torch.randint(0, 2, (2, 64, 64)).float() for _ in range(2)],
        "class_labels": [torch.tensor([0, 1]), torch.tensor([1, 2])],
    }
    return Mask2FormerForUniversalSegmentation(config), call


def yolo(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from ultralytics.nn.tasks import DetectionModel

        return DetectionModel(name, verbose=False, nc=3), (torch.randn(2, 3, 64, 64),)

    return make


MODELS: dict[str, Callable[[], Made]] = {
    "torchvision Faster R-CNN": detection("fasterrcnn_resnet50_fpn"),
    "torchvision Faster R-CNN v2": detection("fasterrcnn_resnet50_fpn_v2"),
    "torchvision RetinaNet": detection("retinanet_resnet50_fpn"),
    "torchvision Mask R-CNN": detection("maskrcnn_resnet50_fpn", masks=True),
    "torchvision FCOS": detection("fcos_resnet50_fpn"),
    "torchvision DeepLabV3": of(
        "torchvision.models.segmentation.deeplabv3_resnet50", shaped(2, 3, 64, 64), weights=None, weights_backbone=None
    ),
    "torchvision Video Swin": of("torchvision.models.video.swin3d_t", shaped(1, 3, 4, 32, 32), weights=None),
    "torchvision RAFT": of(
        "torchvision.models.optical_flow.raft_small",
        lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128), 3),
    ),
    "transformers DETR": detr_plain,
    "transformers Conditional DETR": conditional_detr,
    "transformers Deformable DETR": deformable_detr,
    "transformers RT-DETR": rt_detr,
    "transformers Mask2Former": mask2former,
    "ultralytics YOLOv8": yolo("yolov8n.yaml"),
    "ultralytics YOLO11": yolo("yolo11n.yaml"),
}
