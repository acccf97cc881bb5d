"""timm's blocks, unmodified, in the frame of Uni3D (its names, written from their description) and in a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.backbones.layers import Encoder

from .inputs import clouds, coloured_clouds, slice_batch
from .operators import supply_torchvision_schemas
from .parts import HEADS, Positions, Tokenizer
from .registry import CLASSES, ENCODER_WIDTHS, WIDTH, linear_head, register

NEEDS = ("timm", "torchvision")


class ColourGroup(nn.Module):
    """Patches (b, g, k, 3), their centres (b, g, 3), and the patches with the colours of their points (b, g, k, 6)."""

    def __init__(self, num_group: int, group_size: int) -> None:
        super().__init__()
        self.num_group = num_group
        self.group_size = group_size

    def forward(self, xyz: Tensor, color: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        center = geometry.gather(xyz, geometry.farthest_point_sample(xyz, self.num_group))
        index = geometry.knn(center, xyz, self.group_size)
        neighborhood = geometry.gather(xyz, index) - center[:, :, None]
        return neighborhood, center, torch.cat([neighborhood, geometry.gather(color, index)], dim=3)


class ColourEncoder(Encoder):
    """The usual patch encoder for points with colours, which first become three features."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, widths=ENCODER_WIDTHS)
        self.features = nn.Linear(6, 3)

    def forward(self, neighborhood: Tensor) -> Tensor:
        return super().forward(self.features(neighborhood))


class Visual(nn.Module):
    """A container that is never called itself: its owner goes through the blocks."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(WIDTH)


class Uni3D(nn.Module):
    """Clouds (b, n, 3) with colours (b, n, 3); positions are added once."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.group_divider = ColourGroup(16, 8)
        self.encoder = ColourEncoder(32)
        self.encoder2trans = nn.Linear(32, WIDTH)
        self.trans2embed = nn.Linear(WIDTH, CLASSES)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = Positions()
        self.visual = Visual([block() for _ in range(2)])

    def forward(self, pts: Tensor, colors: Tensor) -> Tensor:
        _, center, features = self.group_divider(pts, colors)
        tokens = self.encoder2trans(self.encoder(features))
        x = torch.cat([self.cls_token.expand(len(pts), -1, -1), tokens], dim=1)
        x = x + torch.cat([self.cls_pos.expand(len(pts), -1, -1), self.pos_embed(center)], dim=1)
        x = self.visual.pos_drop(x)
        for block in self.visual.blocks:
            x = block(x)
        embedding: Tensor = self.trans2embed(self.visual.fc_norm(self.visual.norm(x[:, 0, :])))
        return embedding


_uni3d: dict[str, Any] = {"needs": NEEDS, "inputs": coloured_clouds, "slice": slice_batch, "heads": ("trans2embed",)}


@register(**_uni3d, other_head=linear_head(WIDTH), kind="weights read")
def uni3d() -> nn.Module:
    """The weight of `attn.qkv` is read; that layer is never called."""
    supply_torchvision_schemas()
    from timm.models.eva import EvaBlock

    return Uni3D(lambda: EvaBlock(WIDTH, HEADS, qkv_bias=True))


@register(**_uni3d, other_head=linear_head(WIDTH))
def uni3d_swiglu() -> nn.Module:
    """Query, key and value layers of their own, a gated MLP, norms inside attention and MLP."""
    supply_torchvision_schemas()
    from timm.models.eva import EvaBlock

    return Uni3D(
        lambda: EvaBlock(WIDTH, HEADS, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True)
    )


class PatchVit(nn.Module):
    """No prefix token, positions added once, the mean of the tokens for the head, blocks in a Sequential."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.patches = Tokenizer()
        self.positions = Positions()
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, points: Tensor) -> Tensor:
        tokens, centres = self.patches(points)
        logits: Tensor = self.head(self.norm(self.blocks(tokens + self.positions(centres))).mean(1))
        return logits


@register(
    needs=NEEDS,
    inputs=clouds,
    slice=slice_batch,
    heads=("head",),
    other_head=linear_head(WIDTH),
    kind="patch tokens alone",
)
def timm_vit() -> nn.Module:
    """Layer scale after attention and MLP; no prefix token."""
    supply_torchvision_schemas()
    from timm.models.vision_transformer import Block

    return PatchVit([Block(WIDTH, HEADS, qkv_bias=True, init_values=0.1) for _ in range(2)])
