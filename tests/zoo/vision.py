"""Models that see pictures and films."""

from __future__ import annotations

from typing import Any

import torch

from .case import IN_SINGLE, Batch, Case, classes, classified, pictures, segmented, unlabelled

PATCHES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 32, "patch_size": 8, "num_labels": 3,
}  # fmt: skip
WINDOWS = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
    "window_size": 4, "num_labels": 3,
}  # fmt: skip
STAGES: dict[str, Any] = {
    "image_size": 64, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_labels": 3,
}  # fmt: skip
PYRAMID = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
CONVNEXT = {**STAGES, "hidden_sizes": [8, 12, 16, 16]}
GROUPS_ONLY = ("2", "ids")  # maps of one pixel: a batch norm needs two examples


def images(name: str, options: dict[str, Any], side: int = 32, **more: Any) -> Case:
    return Case(f"{name}ForImageClassification", lambda n: classified(n, side), {**options, **more})


def normed(
    name: str, options: dict[str, Any], side: int = 32, kinds: Any = ("each", *GROUPS_ONLY)
) -> Case:
    """A classifier with batch norms, converted."""
    return Case(
        f"{name}ForImageClassification", lambda n: classified(n, side), options, convert=True,
        kinds=kinds,
    )  # fmt: skip


def films(name: str, **more: Any) -> Case:
    def batch(size: int) -> Batch:
        return {"pixel_values": torch.randn(size, 4, 3, 16, 16), "labels": classes(size)}

    options = {**PATCHES, "image_size": 16, "num_frames": 4, **more}
    return Case(f"{name}ForVideoClassification", batch, options)


def hidden_patches(size: int) -> Batch:
    return {"pixel_values": pictures(size), "noise": torch.rand(size, 16)}


CLASSIFIERS = {
    "vit": images("ViT", PATCHES),
    "deit": images("DeiT", PATCHES),
    "beit": images("Beit", PATCHES, use_relative_position_bias=True, out_indices=[1, 2]),
    "data2vec-vision": images(
        "Data2VecVision", PATCHES, use_shared_relative_position_bias=True, out_indices=[1, 2]
    ),
    "dinov2": images("Dinov2", PATCHES),
    "dinov2-registers": images("Dinov2WithRegisters", PATCHES),
    "vit-msn": images("ViTMSN", PATCHES),
    "swin": images("Swin", WINDOWS),
    "swinv2": images("Swinv2", WINDOWS),
    "convnext": images("ConvNext", CONVNEXT),
    "convnextv2": images("ConvNextV2", CONVNEXT),
    "poolformer": images("PoolFormer", STAGES, 64),
    "focalnet": images(
        "FocalNet", WINDOWS, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3],
        hidden_sizes=[8, 16],
    ),
    "segformer": images("Segformer", PYRAMID, 64),
    "pvt": images("Pvt", PYRAMID, 64, mlp_ratios=[2] * 4),
    "pvtv2": images("PvtV2", PYRAMID, 64, mlp_ratios=[2] * 4),
    "videomae": films("VideoMAE", tubelet_size=2),
    "timesformer": films("Timesformer"),
    "vivit": films("Vivit", tubelet_size=[2, 8, 8]),
}  # fmt: skip

NORMED = {
    "mobilevit": normed(
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [16] * 3, "num_attention_heads": 2, "num_labels": 3,
         "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 16]}, 64,
    ),
    "mobilevitv2": normed(
        "MobileViTV2",
        {"image_size": 64, "width_multiplier": 0.25, "num_labels": 3, "n_attn_blocks": [1] * 3,
         "base_attn_unit_dims": [32] * 3}, 64,
    ),
    "mobilenetv1": normed(
        "MobileNetV1", {"depth_multiplier": 0.25, "min_depth": 4, "num_labels": 3},
        kinds=GROUPS_ONLY,
    ),
    "mobilenetv2": normed(
        "MobileNetV2", {"depth_multiplier": 0.25, "num_labels": 3}, 64, kinds=GROUPS_ONLY
    ),
    "resnet": normed("ResNet", {**STAGES, "embedding_size": 8}, kinds=GROUPS_ONLY),
    "regnet": normed("RegNet", {**STAGES, "embedding_size": 8, "groups_width": 4}, 64),
    "efficientnet": normed(
        "EfficientNet",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.2, "num_labels": 3,
         "hidden_dim": 320}, 64,
    ),
    "levit": normed(
        "Levit",
        {"image_size": 64, "hidden_sizes": [16, 16, 32], "num_attention_heads": [2] * 3,
         "depths": [1] * 3, "key_dim": [8] * 3, "num_labels": 3}, 64, kinds=GROUPS_ONLY,
    ),
    "cvt": normed(
        "Cvt",
        {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3], "num_labels": 3},
        kinds=GROUPS_ONLY,
    ),
}  # fmt: skip

# ---- other than one class ----

BACKBONE = {
    "model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
UPERNET = {
    "backbone_config": BACKBONE, "hidden_size": 8, "num_labels": 3, "auxiliary_channels": 8,
    "auxiliary_in_channels": 16, "pool_scales": [1, 2],
}  # fmt: skip
DPT = {
    **PATCHES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "is_hybrid": False,
    "use_batch_norm_in_fusion_residual": False,
}  # fmt: skip
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "backbone_config": {"model_type": "resnet", "embedding_size": 8, "depths": [1] * 4,
                        "hidden_sizes": [8, 8, 16, 16], "out_features": ["stage4"]},
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 5,
    "num_labels": 3,
}  # fmt: skip


def boxes(size: int) -> Batch:
    """One object in each picture, as the loss is divided by their number."""
    return {"pixel_values": pictures(size, 64), "class_labels": classes(size, 1),
            "boxes": torch.rand(size, 1, 4) * 0.4 + 0.1}  # fmt: skip


def as_labels(batch: Batch) -> dict[str, Any]:
    pairs = zip(batch["class_labels"], batch["boxes"], strict=True)
    labels = [{"class_labels": name, "boxes": box} for name, box in pairs]
    return {"pixel_values": batch["pixel_values"], "labels": labels}


SEEING = {
    "vit-mae": Case(
        "ViTMAEForPreTraining", hidden_patches,
        {**PATCHES, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1,
         "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24},
    ),
    "segformer-pixels": Case("SegformerForSemanticSegmentation", segmented, PYRAMID, convert=True),
    "dpt": Case("DPTForSemanticSegmentation", lambda n: segmented(n, 32), DPT, convert=True),
    "upernet": Case(
        "UperNetForSemanticSegmentation", segmented, UPERNET, convert=True, kinds=GROUPS_ONLY
    ),
    "detr": Case(
        "DetrForObjectDetection", boxes, DETR, IN_SINGLE, convert=True, arguments=as_labels
    ),
    "yolos": Case(
        "YolosModel", unlabelled, {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 4}
    ),
    "swin2sr": Case(
        "Swin2SRForImageSuperResolution", lambda n: unlabelled(n, 16),
        {"image_size": 16, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4,
         "upscale": 2},
    ),
    "flava-images": Case("FlavaImageModel", unlabelled, PATCHES),
}  # fmt: skip

VISION = {**CLASSIFIERS, **NORMED, **SEEING}
