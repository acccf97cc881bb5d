"""Models with the names and the layouts of the official Point Transformer V1 and V2, written from their description.

Clouds are packed: coordinates (n, 3), features (n, c), and `offset` (b), where each sample ends. The three travel as
one list, which a block takes and gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inputs import POINTS, offset_dict, offset_list, slice_offset
from .operators import fps, knn, voxel_grid
from .registry import CLASSES, linear_head, register

NARROW, WIDE = 16, 24
NEIGHBOURS = 8

Points = list[Tensor]
"""[coordinates, features, offset]."""


def sample_numbers(offset: Tensor) -> Tensor:
    """(n) of offsets (b)."""
    return torch.arange(len(offset)).repeat_interleave(offset.diff(prepend=offset.new_zeros(1)))


def neighbours(coord: Tensor, offset: Tensor, queries: Tensor, query_offset: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Indices (m, k) of the points nearest to each query in its own sample, which has k points or more."""
    return knn(coord, queries, k, sample_numbers(offset), sample_numbers(query_offset))[1].view(-1, k)


def upsampled(fine: Points, coarse: Points) -> Tensor:
    """The features of the three nearest coarse points, weighted by their nearness, at the fine ones."""
    near = neighbours(coarse[0], coarse[2], fine[0], fine[2], k=3)
    weights = 1 / ((coarse[0][near] - fine[0][:, None]).square().sum(2) + 1e-8)
    return (coarse[1][near] * (weights / weights.sum(1, keepdim=True))[:, :, None]).sum(1)


class Norm(nn.BatchNorm1d):
    """Batch norm over the last axis, whatever stands before it."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features.flatten(0, -2)).view_as(features)


# ---- V1 --------------------------------------------------------------------------------------------------------------


class PointTransformerLayer(nn.Module):
    """Vector attention over the neighbours of each point; the position is part of it."""

    def __init__(self, width: int, share: int = 4) -> None:
        super().__init__()
        self.share = share
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_p = nn.Sequential(nn.Linear(3, 3), Norm(3), nn.ReLU(), nn.Linear(3, width))
        few = width // share
        self.linear_w = nn.Sequential(
            Norm(width), nn.ReLU(), nn.Linear(width, few), Norm(few), nn.ReLU(), nn.Linear(few, few)
        )

    def forward(self, pxo: Points) -> Tensor:
        p, x, o = pxo
        near = neighbours(p, o, p, o)
        q, k, v = self.linear_q(x), self.linear_k(x)[near], self.linear_v(x)[near]
        position = self.linear_p(p[near] - p[:, None])
        weights = self.linear_w(k - q[:, None] + position).softmax(1)
        mixed: Tensor = ((v + position).unflatten(2, (self.share, -1)) * weights[:, :, None]).sum(1).flatten(1)
        return mixed


class PointTransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, width, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.transformer2 = PointTransformerLayer(width)
        self.bn2 = nn.BatchNorm1d(width)
        self.linear3 = nn.Linear(width, width, bias=False)
        self.bn3 = nn.BatchNorm1d(width)
        self.relu = nn.ReLU(inplace=True)

    def attend(self, pxo: Points) -> Tensor:
        mixed: Tensor = self.transformer2(pxo)
        return mixed

    def forward(self, pxo: Points) -> Points:
        p, x, o = pxo
        shortcut = x
        x = self.relu(self.bn1(self.linear1(x)))
        x = self.relu(self.bn2(self.attend([p, x, o])))
        x = self.bn3(self.linear3(x))
        return [p, self.relu(x + shortcut), o]


class PointceptBlock(PointTransformerBlock):
    """Pointcept's own, which is the same but for a name."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.transformer2
        self.transformer = PointTransformerLayer(width)

    def attend(self, pxo: Points) -> Tensor:
        mixed: Tensor = self.transformer(pxo)
        return mixed


class TransitionDown(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.linear = nn.Linear(width if stride == 1 else 3 + width, out, bias=False)
        self.bn = Norm(out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, pxo: Points) -> Points:
        p, x, o = pxo
        if self.stride == 1:
            return [p, self.relu(self.bn(self.linear(x))), o]
        samples = sample_numbers(o)
        kept = fps(p, samples, 1 / self.stride, random_start=False)
        fewer = samples[kept].bincount().cumsum(0)
        near = neighbours(p, o, p[kept], fewer)
        around = torch.cat([p[near] - p[kept, None], x[near]], dim=2)
        return [p[kept], self.relu(self.bn(self.linear(around))).amax(1), fewer]


class TransitionUp(nn.Module):
    """Called with the finer points and the coarser ones, or at the coarsest with one list alone."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        if out is None:
            self.linear1 = nn.Sequential(nn.Linear(2 * width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
            self.linear2 = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True))
        else:
            self.linear1 = nn.Sequential(nn.Linear(out, out), nn.BatchNorm1d(out), nn.ReLU(inplace=True))
            self.linear2 = nn.Sequential(nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU(inplace=True))

    def forward(self, fine: Points, coarse: Points | None = None) -> Tensor:
        _, x, o = fine
        if coarse is None:
            samples = sample_numbers(o)
            mean = torch.stack([x[samples == i].mean(0) for i in range(len(o))])
            out: Tensor = self.linear1(torch.cat([x, self.linear2(mean)[samples]], dim=1))
            return out
        features: Tensor = self.linear1(x) + upsampled(fine, [coarse[0], self.linear2(coarse[1]), coarse[2]])
        return features


class PointTransformerV1(nn.Module):
    """Logits (n, c) of packed clouds [coordinates, features, offset]."""

    def __init__(self, block: type[PointTransformerBlock] = PointTransformerBlock) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(TransitionDown(6, NARROW, 1), block(NARROW))
        self.enc2 = nn.Sequential(TransitionDown(NARROW, WIDE, 4), block(WIDE), block(WIDE))
        self.dec2 = nn.Sequential(TransitionUp(WIDE), block(WIDE))
        self.dec1 = nn.Sequential(TransitionUp(WIDE, NARROW), block(NARROW))
        self.cls = nn.Sequential(
            nn.Linear(NARROW, NARROW), nn.BatchNorm1d(NARROW), nn.ReLU(), nn.Linear(NARROW, CLASSES)
        )

    def forward(self, pxo: Points) -> Tensor:
        p, x, o = pxo
        fine = self.enc1([p, torch.cat([p, x], dim=1), o])
        coarse = self.enc2(fine)
        coarse = self.dec2[1:]([coarse[0], self.dec2[0](coarse), coarse[2]])
        fine = self.dec1[1:]([fine[0], self.dec1[0](fine, coarse), fine[2]])
        logits: Tensor = self.cls(fine[1])
        return logits


_segmentation: dict[str, Any] = {
    "slice": slice_offset,
    "select": lambda output: output.unflatten(0, (-1, POINTS)),
    "other_head": linear_head(NARROW),
    "kind": "packed",
}


@register(**_segmentation, inputs=offset_list, heads=("cls",))
def official_ptv1() -> nn.Module:
    """The input is one list; blocks take and give such lists; samples are told apart by where they end."""
    return PointTransformerV1()


class PointceptV1(PointTransformerV1):
    """The same of Pointcept, whose input is a mapping."""

    def __init__(self) -> None:
        super().__init__(PointceptBlock)

    def forward(self, input_dict: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward([input_dict["coord"], input_dict["feat"], input_dict["offset"].int()])


@register(**_segmentation, inputs=offset_dict, heads=("cls",))
def pointcept_ptv1() -> nn.Module:
    """As in the first V1, with a mapping for its input and another name for the attention."""
    return PointceptV1()


class PointceptV1Classifier(nn.Module):
    """Logits (b, c); the stages are lists, and the first has no block."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.ModuleList([TransitionDown(6, NARROW, 1)])
        self.enc2 = nn.ModuleList([TransitionDown(NARROW, WIDE, 4), PointceptBlock(WIDE), PointceptBlock(WIDE)])
        self.cls = nn.Sequential(nn.Linear(WIDE, WIDE), nn.BatchNorm1d(WIDE), nn.ReLU(), nn.Linear(WIDE, CLASSES))

    def forward(self, data_dict: dict[str, Tensor]) -> Tensor:
        p, x, o = data_dict["coord"], data_dict["feat"], data_dict["offset"].int()
        pxo = [p, torch.cat([p, x], dim=1), o]
        for layer in (*self.enc1, *self.enc2):
            pxo = layer(pxo)
        samples = sample_numbers(pxo[2])
        logits: Tensor = self.cls(torch.stack([pxo[1][samples == i].mean(0) for i in range(len(o))]))
        return logits


# ---- V2 --------------------------------------------------------------------------------------------------------------


class GroupedVectorAttention(nn.Module):
    def __init__(self, width: int, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.linear_q = nn.Sequential(nn.Linear(width, width), Norm(width), nn.ReLU(inplace=True))
        self.linear_k = nn.Sequential(nn.Linear(width, width), Norm(width), nn.ReLU(inplace=True))
        self.linear_v = nn.Linear(width, width)
        self.linear_p_bias = nn.Sequential(nn.Linear(3, width), Norm(width), nn.ReLU(), nn.Linear(width, width))
        self.weight_encoding = nn.Sequential(
            nn.Linear(width, groups), Norm(groups), nn.ReLU(), nn.Linear(groups, groups)
        )

    def forward(self, feat: Tensor, coord: Tensor, reference_index: Tensor) -> Tensor:
        q, k, v = self.linear_q(feat), self.linear_k(feat)[reference_index], self.linear_v(feat)[reference_index]
        position = self.linear_p_bias(coord[reference_index] - coord[:, None])
        weights = self.weight_encoding(k - q[:, None] + position).softmax(1)
        mixed: Tensor = ((v + position).unflatten(2, (self.groups, -1)) * weights[..., None]).sum(1).flatten(1)
        return mixed


class BlockV2(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = GroupedVectorAttention(width)
        self.fc1 = nn.Linear(width, width, bias=False)
        self.fc3 = nn.Linear(width, width, bias=False)
        self.norm1 = Norm(width)
        self.norm2 = Norm(width)
        self.norm3 = Norm(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, points: Points, reference_index: Tensor) -> Points:
        coord, feat, offset = points
        shortcut = feat
        feat = self.act(self.norm1(self.fc1(feat)))
        feat = self.act(self.norm2(self.attn(feat, coord, reference_index)))
        feat = self.norm3(self.fc3(feat))
        return [coord, self.act(shortcut + feat), offset]


class BlockSequence(nn.Module):
    """Blocks that share one search for neighbours."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BlockV2(width) for _ in range(depth))

    def forward(self, points: Points) -> Points:
        coord, _, offset = points
        reference_index = neighbours(coord, offset, coord, offset)
        for block in self.blocks:
            points = block(points, reference_index)
        return points


class GridPool(nn.Module):
    """One point for each cell of a grid: the mean of the coordinates, the maximum of the features."""

    def __init__(self, width: int, out: int, size: float) -> None:
        super().__init__()
        self.size = size
        self.fc = nn.Linear(width, out, bias=False)
        self.norm = Norm(out)
        self.act = nn.ReLU(inplace=True)

    def forward(self, points: Points) -> tuple[Points, Tensor]:
        coord, feat, offset = points
        feat = self.act(self.norm(self.fc(feat)))
        samples = sample_numbers(offset)
        lowest = torch.stack([coord[samples == i].amin(0) for i in range(len(offset))])
        cells = voxel_grid(coord - lowest[samples], self.size, samples, start=0)
        cells, cluster = cells.unique(return_inverse=True)

        def pooled(values: Tensor, how: str) -> Tensor:
            out = values.new_zeros(len(cells), values.shape[1])
            return out.scatter_reduce(0, cluster[:, None].expand_as(values), values, how, include_self=False)

        count = pooled(samples[:, None], "amax")[:, 0].bincount()
        return [pooled(coord, "mean"), pooled(feat, "amax"), count.cumsum(0)], cluster


class UnpoolWithSkip(nn.Module):
    """Back to the points by the number of the cell of each."""

    def __init__(self, width: int, skip: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, out), Norm(out), nn.ReLU(inplace=True))
        self.proj_skip = nn.Sequential(nn.Linear(skip, out), Norm(out), nn.ReLU(inplace=True))

    def forward(self, points: Points, skip: Points, cluster: Tensor) -> Points:
        return [skip[0], self.proj(points[1])[cluster] + self.proj_skip(skip[1]), skip[2]]


class EncoderStage(nn.Module):
    def __init__(self, width: int, out: int, depth: int) -> None:
        super().__init__()
        self.down = GridPool(width, out, 0.5)
        self.blocks = BlockSequence(out, depth)

    def forward(self, points: Points) -> tuple[Points, Tensor]:
        points, cluster = self.down(points)
        return self.blocks(points), cluster


class DecoderStage(nn.Module):
    def __init__(self, width: int, skip: int, out: int, depth: int) -> None:
        super().__init__()
        self.up = UnpoolWithSkip(width, skip, out)
        self.blocks = BlockSequence(out, depth)

    def forward(self, points: Points, skip: Points, cluster: Tensor) -> Points:
        pooled: Points = self.blocks(self.up(points, skip, cluster))
        return pooled


class PatchEmbed(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(width, out, bias=False), Norm(out), nn.ReLU(inplace=True))
        self.blocks = BlockSequence(out, 1)

    def forward(self, points: Points) -> Points:
        coord, feat, offset = points
        embedded: Points = self.blocks([coord, self.proj(feat), offset])
        return embedded


class PointTransformerV2(nn.Module):
    """Logits (n, c) of packed clouds {"coord", "feat", "offset"}."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(6, NARROW)
        self.enc_stages = nn.ModuleList([EncoderStage(NARROW, WIDE, 2)])
        self.dec_stages = nn.ModuleList([DecoderStage(WIDE, NARROW, NARROW, 1)])
        self.seg_head = nn.Sequential(nn.Linear(NARROW, NARROW), Norm(NARROW), nn.ReLU(), nn.Linear(NARROW, CLASSES))

    def forward(self, data_dict: dict[str, Tensor]) -> Tensor:
        coord, offset = data_dict["coord"], data_dict["offset"].int()
        points = self.patch_embed([coord, torch.cat([coord, data_dict["feat"]], dim=1), offset])
        skips = []
        for stage in self.enc_stages:
            coarse, cluster = stage(points)
            skips.append((points, cluster))
            points = coarse
        for stage in self.dec_stages:
            points = stage(points, *skips.pop())
        logits: Tensor = self.seg_head(points[1])
        return logits


@register(**_segmentation, inputs=offset_dict, heads=("seg_head",))
def official_ptv2() -> nn.Module:
    """Blocks take a list and the numbers of the neighbours; coarser points are means over the cells of a grid."""
    return PointTransformerV2()
