"""torch-pointcloud's backbones, unmodified: clouds packed in one row of points, with each point's sample number."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from . import operators
from .inputs import LABELS, POINTS, packed_clouds, packed_labelled_clouds, slice_packed, voxel_clouds
from .registry import CLASSES, WIDTH, linear_head, register

NEEDS = ("torch_geometric", "torch_pointcloud")


def model_class(module: str, name: str) -> Any:
    """A class of torch_pointcloud.models, to run without pyg-lib."""
    operators.supply_pyg_operators()
    operators.supply_ocnn()
    kind = getattr(importlib.import_module(f"torch_pointcloud.models.{module}"), name)
    # This file has the function under a name of its own.
    importlib.import_module("torch_pointcloud.layers.voxel_grid_pool").__dict__["voxel_grid"] = operators.voxel_grid
    return kind


def by_sample(output: Tensor) -> Tensor:
    return output.view(-1, POINTS, output.shape[1])


_patches: dict[str, Any] = {"num_groups": 16, "group_size": 8}
_encoder: dict[str, Any] = {"encoder_local_channels": (16, 32), "encoder_global_channels": (32,)}
_vit: dict[str, Any] = {"in_channels": 0, "num_classes": CLASSES, "embed_dim": WIDTH, "num_heads": 4, **_patches}
_point_mae: dict[str, Any] = {**_vit, **_encoder, "pos_embed_channels": (16,)}

FEATURES = 32
"""Features of a point that the segmenting models interpolate, 1,024 as published."""


def _propagation(channels: int, hidden: int) -> nn.Module:
    module: nn.Module = importlib.import_module("torch_pointcloud.layers").PointNet2FeaturePropagation(
        [channels + 3, hidden, FEATURES], norm="batch_norm", plain_last=False, weighting="squared", eps=1e-8
    )
    return module


def _head(channels: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 16), nn.ReLU(), nn.Linear(16, CLASSES))


# ---- Point-MAE -------------------------------------------------------------------------------------------------------


@register(
    needs=NEEDS,
    inputs=packed_clouds,
    slice=slice_packed,
    heads=("head",),
    other_head=linear_head(2 * WIDTH),
    random_in_training=True,
)
def torch_pointcloud() -> nn.Module:
    model: nn.Module = model_class("point_mae", "PointMAEClassification")(**_point_mae, depth=2)
    return model


@register(
    needs=NEEDS,
    inputs=packed_labelled_clouds,
    slice=slice_packed,
    select=by_sample,
    heads=("label_conv", "propagation_0", "head"),
    other_head=linear_head(FEATURES + 6 * WIDTH + 64),
    random_in_training=True,
    kind="patch tokens alone",
)
def torch_pointcloud_part_seg() -> nn.Module:
    """As published the blocks that reach the prediction are the fourth, the eighth and the last of twelve."""
    model: Any = model_class("point_mae", "PointMAEPartSegmentation")(**_point_mae, num_categories=LABELS, depth=12)
    model.blocks.blocks, model.fetch_idx = model.blocks.blocks[:4], (1, 2, 3)
    model.propagation_0, model.head = _propagation(3 * WIDTH, 4 * WIDTH), _head(FEATURES + 6 * WIDTH + 64)
    part_seg: nn.Module = model
    return part_seg


# ---- further vision transformers -------------------------------------------------------------------------------------

_classification: dict[str, Any] = {"needs": NEEDS, "inputs": packed_clouds, "slice": slice_packed, "heads": ("head",)}


@register(**_classification, other_head=linear_head(2 * WIDTH), random_in_training=True)
def torch_pointcloud_point_bert() -> nn.Module:
    """The blocks lie in `encoder`, which has its own class token; tokens are projected to the width."""
    model: nn.Module = model_class("point_bert", "PointBERTClassification")(
        **_vit,
        depth=2,
        encoder_dims=16,
        token_local_channels=(16, 32),
        token_global_channels=(32,),
        pos_embed_channels=(16,),
        head_channels=16,
    )
    return model


@register(
    **{**_classification, "heads": ("cls_norm", "head")},
    other_head=linear_head(2 * WIDTH),
    random_in_training=True,
    unused=("generator_blocks", "norm"),
    kind="masked or sequence first",
)
def torch_pointcloud_pointgpt() -> nn.Module:
    """Sequence first inside `blocks`, a causal mask (l, l), two prefix tokens, a generator that is never called."""
    kind = model_class("pointgpt", "PointGPTClassification")
    model: nn.Module = kind(**_vit, **_encoder, depth=2, decoder_depth=1)
    return model


_m2ae: dict[str, Any] = {
    "in_channels": 0,
    "num_classes": CLASSES,
    "group_sizes": (8, 4, 4),
    "num_groups": (16, 8, 4),
    "encoder_depths": (2, 1, 1),
    "encoder_dims": (12, 24, 48),
    "token_local_channels": (16, 32),
    "token_global_channels": (32,),
    "local_radius": (0.6, 1.0, 1.6),
    "num_heads": 4,
}


@register(**_classification, other_head=linear_head(48), random_in_training=True, kind="hierarchical")
def torch_pointcloud_point_m2ae() -> nn.Module:
    """Three stages of different widths and token counts, additive masks (b, l, l) by radius, no prefix."""
    model: nn.Module = model_class("point_m2ae", "PointM2AEClassification")(**_m2ae, head_channels=(32,))
    return model


@register(
    needs=NEEDS,
    inputs=packed_labelled_clouds,
    slice=slice_packed,
    select=by_sample,
    heads=(*(f"propagations.{level}" for level in range(3)), "label_conv", "head"),
    other_head=linear_head(6 * FEATURES + 64),
    random_in_training=True,
    kind="hierarchical",
)
def torch_pointcloud_point_m2ae_part_seg() -> nn.Module:
    """Every stage's tokens reach the prediction."""
    model: nn.Module = model_class("point_m2ae", "PointM2AEPartSegmentation")(**_m2ae, num_categories=LABELS)
    model.propagations = nn.ModuleList(_propagation(channels, 48) for channels in _m2ae["encoder_dims"])
    model.head = _head(6 * FEATURES + 64)
    return model


# ---- point transformers without patches ------------------------------------------------------------------------------

_segmentation: dict[str, Any] = {**_classification, "select": by_sample}
_encoder_stages: dict[str, Any] = {
    "encoder_channels": (16, WIDTH),
    "encoder_depths": (2, 2),
    "encoder_attention_groups": (4, 4),
    "encoder_num_neighbors": (8, 8),
}
_decoder_stages: dict[str, Any] = {
    "decoder_channels": (16,),
    "decoder_depths": (1,),
    "decoder_attention_groups": (4,),
    "decoder_num_neighbors": (8,),
}


@register(**_classification, other_head=linear_head(WIDTH), random_in_training=True, kind="packed")
def torch_pointcloud_ptv1() -> nn.Module:
    """Vector attention over a graph of neighbours: tokens (n, c) in one row, fewer from stage to stage."""
    kind = model_class("point_transformer", "PointTransformerClassification")
    model: nn.Module = kind(0, CLASSES, **_encoder_stages, ratios=(0.25,))
    return model


@register(**_segmentation, other_head=linear_head(16), random_in_training=True, kind="packed")
def torch_pointcloud_ptv1_seg() -> nn.Module:
    kind = model_class("point_transformer", "PointTransformerSegmentation")
    model: nn.Module = kind(0, CLASSES, **_encoder_stages, **_decoder_stages, ratios=(0.25,))
    return model


@register(**_classification, other_head=linear_head(WIDTH), kind="packed")
def torch_pointcloud_ptv2() -> nn.Module:
    """Coarser points are means over cells of a grid, not points of the cloud."""
    kind = model_class("point_transformer_v2", "PointTransformerV2Classification")
    model: nn.Module = kind(3, CLASSES, grid_sizes=(0.5,), **_encoder_stages)
    return model


@register(**_segmentation, other_head=linear_head(16), kind="packed")
def torch_pointcloud_ptv2_seg() -> nn.Module:
    kind = model_class("point_transformer_v2", "PointTransformerV2Segmentation")
    model: nn.Module = kind(3, CLASSES, grid_sizes=(0.5,), **_encoder_stages, **_decoder_stages)
    return model


ptv3_sizes: dict[str, Any] = {
    "in_channels": 3,
    "num_classes": CLASSES,
    "strides": (2,),
    "encoder_channels": (16, WIDTH),
    "encoder_depths": (2, 2),
    "encoder_num_heads": (2, 4),
    "encoder_patch_size": (16, 16),
    "shuffle_serialization_orders": False,
    "use_flash_attn": False,
    "drop_path": 0.0,
}
_voxels: dict[str, Any] = {"needs": (*NEEDS, "spconv"), "inputs": voxel_clouds, "bfloat16": False}


@register(**{**_classification, **_voxels}, other_head=linear_head(WIDTH), kind="packed")
def torch_pointcloud_ptv3() -> nn.Module:
    """Blocks pass on (tokens, sparse tensor of them); attention within patches of a serialised order."""
    operators.supply_spconv_on_cpu()
    model: nn.Module = model_class("point_transformer_v3", "PointTransformerV3Classification")(**ptv3_sizes)
    return model


@register(**{**_segmentation, **_voxels}, other_head=linear_head(16), kind="packed")
def torch_pointcloud_ptv3_seg() -> nn.Module:
    operators.supply_spconv_on_cpu()
    model: nn.Module = model_class("point_transformer_v3", "PointTransformerV3Segmentation")(
        **ptv3_sizes, decoder_channels=(16,), decoder_depths=(1,), decoder_num_heads=(2,), decoder_patch_size=(16,)
    )
    return model
