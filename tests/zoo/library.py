"""This library's own backbones."""

from __future__ import annotations

from typing import Any

from torch import nn

from point_peft.backbones import HierarchicalPointTransformer, PointTransformer, PointTransformerPartSeg
from point_peft.backbones.layers import Encoder

from .inputs import LABELS, clouds, labelled_clouds, slice_batch
from .registry import CLASSES, ENCODER_WIDTHS, WIDTH, linear_head, register


def transformer(**options: Any) -> PointTransformer:
    """Make a tiny one; what the options do not say is small."""
    sizes: dict[str, Any] = {
        "trans_dim": WIDTH,
        "depth": 2,
        "num_heads": 4,
        "num_group": 16,
        "group_size": 8,
        "encoder_dims": WIDTH,
    }
    sizes |= {"cls_dim": CLASSES, **options}
    model = PointTransformer(**sizes)
    model.encoder = Encoder(sizes["encoder_dims"], widths=ENCODER_WIDTHS)
    return model


_classification: dict[str, Any] = {"inputs": clouds, "slice": slice_batch, "heads": ("cls_head_finetune",)}


@register(**_classification, other_head=linear_head(2 * WIDTH))
def point_mae() -> nn.Module:
    return transformer(depth=3)


@register(**_classification, other_head=linear_head(2 * WIDTH))
def point_bert() -> nn.Module:
    return transformer(encoder_dims=16, num_group=12, head_norm=False)


@register(**_classification, other_head=linear_head(2 * WIDTH))
def pcp_mae() -> nn.Module:
    return transformer(pos_features="sine")


@register(**_classification, other_head=linear_head(4 * WIDTH))
def recon() -> nn.Module:
    return transformer(prefix_tokens=("cls", "img", "text"))


@register(**_classification, other_head=linear_head(24), kind="hierarchical")
def point_m2ae() -> nn.Module:
    """Three levels of different widths, without prefix tokens, and with masks (b, l, l)."""
    return HierarchicalPointTransformer(
        num_groups=(16, 8, 4),
        group_sizes=(8, 4, 4),
        encoder_dims=(12, 24, 24),
        encoder_depths=(2, 1, 1),
        local_radius=(0.8, 1.2, 1.6),
        num_heads=4,
        cls_dim=CLASSES,
    )


@register(
    inputs=labelled_clouds,
    slice=slice_batch,
    heads=("label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3"),
    other_head=lambda: nn.Conv1d(256, 7, 1),
    kind="patch tokens alone",
)
def part_seg() -> nn.Module:
    model = PointTransformerPartSeg(
        trans_dim=WIDTH,
        depth=3,
        num_heads=4,
        num_group=16,
        group_size=8,
        encoder_dims=WIDTH,
        cls_dim=CLASSES,
        num_labels=LABELS,
        taps=(0, 2),
    )
    model.encoder = Encoder(WIDTH, widths=ENCODER_WIDTHS)
    return model
