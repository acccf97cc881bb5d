"""torch-pointcloud's models of scenes, unmodified: pre-trained encoders with a linear head, windows of an octree."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from . import operators
from .inputs import POINTS, packed_clouds, slice_packed, voxel_clouds
from .mamba import Mamba
from .registry import CLASSES, WIDTH, Args, linear_head, register
from .torch_pointcloud import NEEDS, by_sample, model_class, ptv3_sizes

_unpooled: dict[str, Any] = {
    "needs": (*NEEDS, "spconv", "ocnn"),
    "inputs": voxel_clouds,
    "slice": slice_packed,
    "select": by_sample,
    "heads": ("head",),
    "other_head": linear_head(16 + WIDTH),
    "bfloat16": False,
    "kind": "packed",
}


@register(**_unpooled)
def torch_pointcloud_sonata() -> nn.Module:
    """No decoder: what every stage made of a point is un-pooled, and a linear head reads all of it."""
    operators.supply_spconv_on_cpu()
    model: nn.Module = model_class("sonata", "SonataSegmentation")(**ptv3_sizes)
    return model


@register(**_unpooled)
def torch_pointcloud_concerto() -> nn.Module:
    operators.supply_spconv_on_cpu()
    model: nn.Module = model_class("concerto", "ConcertoSegmentation")(**ptv3_sizes)
    return model


def _placed_voxels(batch: int, seed: int) -> Args:
    """(features, positions, cells (b * n, 3), sample numbers (b * n))."""
    features, cells, samples = voxel_clouds(batch, seed)
    return features, features.clone(), cells, samples


def _slice_placed(args: Args, i: int) -> Args:
    features, positions, cells, samples = args
    own = samples == i
    return features[own], positions[own], cells[own], samples[own] - i


@register(**{**_unpooled, "inputs": _placed_voxels, "slice": _slice_placed})
def torch_pointcloud_utonia() -> nn.Module:
    """Queries and keys are turned by where their points are, of which a block is told beside their cells."""
    operators.supply_spconv_on_cpu()
    model: nn.Module = model_class("utonia", "UtoniaSegmentation")(**{**ptv3_sizes, "encoder_channels": (12, WIDTH)})
    return model


# ---- windows of an octree --------------------------------------------------------------------------------------------

DEPTH = 3
"""Levels of the octrees, of 8 cells along each axis at the finest."""
COARSE = POINTS // 3
"""Cells of the level above that have points: windows of both levels hold whole samples."""


def _octree(positions: Tensor, samples: Tensor) -> Any:
    """The octree of packed points with four features each."""
    operators.supply_ocnn()
    octrees = importlib.import_module("ocnn.octree")
    count = int(samples[-1]) + 1
    features = torch.cat([positions, positions.norm(dim=1, keepdim=True)], dim=1)
    points = octrees.Points(positions, features=features, batch_id=samples[:, None], batch_size=count)
    octree = octrees.Octree(DEPTH, full_depth=2, batch_size=count)
    octree.build_octree(points)
    octree.construct_all_neigh()
    return octree


def octree_clouds(batch: int, seed: int) -> Args:
    """(no features, octree, depth, positions (b * n, 3), sample numbers (b * n)): three points in each coarse cell."""
    generator = torch.Generator().manual_seed(seed)
    cells = []
    for _ in range(batch):
        coarse = torch.randperm(64, generator=generator)[:COARSE, None]
        fine = torch.rand(COARSE, 8, generator=generator).argsort(dim=1)[:, :3]
        axes = [2 * (coarse // 4**axis % 4) + fine // 2**axis % 2 for axis in range(3)]
        cells.append(torch.stack(axes, dim=2).flatten(0, 1)[torch.randperm(POINTS, generator=generator)])
    cell, samples = torch.cat(cells), torch.arange(batch).repeat_interleave(POINTS)
    positions = (cell + 0.8 * torch.rand(len(cell), 3, generator=generator) + 0.1) / 4 - 1
    return None, _octree(positions, samples), DEPTH, positions, samples


def _slice_octree(args: Args, i: int) -> Args:
    _, _, depth, positions, samples = args
    own = samples == i
    return None, _octree(positions[own], samples[own] - i), depth, positions[own], samples[own] - i


@register(
    needs=(*NEEDS, "ocnn"),
    inputs=octree_clouds,
    slice=_slice_octree,
    select=by_sample,
    heads=("decoder", "head"),
    other_head=linear_head(16),
    bfloat16=False,
    kind="packed",
)
def torch_pointcloud_octformer() -> nn.Module:
    """Attention in windows of an octree's cells, which is no tensor: no module is told where its tokens lie."""
    model: nn.Module = model_class("octformer", "OctFormerSegmentation")(
        in_channels=4,
        num_classes=CLASSES,
        stem_channels=(16,),
        encoder_channels=(16, WIDTH),
        encoder_depths=(2, 2),
        num_heads=(2, 4),
        fpn_channels=16,
        patch_size=8,
        dilation=2,
        drop_path=0.0,
        dropout=0.0,
        use_checkpoint=False,
    )
    return model


# ---- state spaces ----------------------------------------------------------------------------------------------------


@register(
    needs=NEEDS,
    inputs=packed_clouds,
    slice=slice_packed,
    heads=("head",),
    other_head=linear_head(WIDTH),
    random_in_training=True,
    kind="weights read",
)
def torch_pointcloud_point_mamba() -> nn.Module:
    """No attention: tokens along two curves in one row, which a state runs through from block to block."""
    kind = model_class("point_mamba", "PointMambaClassification")
    importlib.import_module("torch_pointcloud.models.point_mamba").__dict__["Mamba"] = Mamba
    model: nn.Module = kind(
        0,
        CLASSES,
        embed_dim=WIDTH,
        depth=2,
        num_groups=16,
        group_size=8,
        drop_path=0.0,
        patch_local_channels=(16, 32),
        patch_global_channels=(32,),
        pos_embed_channels=(16,),
        dropout=0.0,
    )
    return model


# ---- detection -------------------------------------------------------------------------------------------------------


def _boxes(output: dict[str, Tensor]) -> Tensor:
    """Class logits of each box (b, q, c), moved by what the other heads say of it, so that every head matters."""
    others = ("center_unnormalized", "size_unnormalized", "angle_logits", "angle_residual")
    moved = [output[name].mean(dim=2, keepdim=True) for name in others]
    return output["sem_cls_logits"] + torch.stack(moved).sum(0)


@register(
    needs=NEEDS,
    inputs=packed_clouds,
    slice=slice_packed,
    select=_boxes,
    heads=tuple(f"mlp_heads.{name}_head" for name in ("center", "size", "angle_cls", "angle_residual", "sem_cls")),
    other_head=lambda: nn.Conv1d(WIDTH, 7, 1),
    random_in_training=True,
    # The queries start as zeros, of which a norm makes its bias.
    unused=("decoder.layers.0.norm1.weight",),
    kind="hierarchical",
)
def torch_pointcloud_3detr() -> nn.Module:
    """An encoder of tokens, sequence first, that are told no positions, and a decoder of queries, which boxes are."""
    model: nn.Module = model_class("threedetr", "ThreeDETRDetection")(
        0,
        CLASSES - 1,
        num_heading_bins=2,
        num_queries=6,
        preencoder_num_points=16,
        encoder_embed_dim=WIDTH,
        encoder_feedforward_channels=2 * WIDTH,
        encoder_depth=2,
        encoder_dropout=0.0,
        decoder_embed_dim=WIDTH,
        decoder_feedforward_channels=2 * WIDTH,
        decoder_depth=2,
        decoder_dropout=0.0,
        mlp_dropout=0.0,
        preenc_radius=0.6,
        preenc_nsample=8,
    )
    return model
