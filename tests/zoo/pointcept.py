"""Models with the names and the layout of Pointcept's Point Transformer V3, written from their description.

One mutable `Point` goes through all modules. Each has two copies of the features, `feat` and those in the immutable
`sparse_conv_feat`; the convolutions read the second.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import GRID, POINTS, slice_offset, voxel_dict
from .registry import CLASSES, linear_head, register

PATCH = 16
"""Tokens in each patch of the serialised attention."""
CURVES = ([0, 1, 2], [1, 0, 2])
"""The axes of each curve: the second has x and y exchanged."""


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features (n, c) on cells of a grid, and which of them lie beside which."""

    features: Tensor
    neighbours: Tensor
    """Number of the cell in each of the 27 directions (n, 27); n where there is none."""

    def replace_feature(self, features: Tensor) -> SparseTensor:
        return replace(self, features=features)


class Point(dict[str, Any]):
    """All that is known of the points of a batch; its entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def serialize(self) -> None:
        """Order the points of each sample along two Z curves, and cut any such order into patches (p, k)."""
        curves = [_z_code(self.grid_coord[:, axes]) for axes in CURVES]
        self.serialized_order = (torch.stack(curves) + self.batch * GRID**3).argsort()
        self.serialized_inverse = self.serialized_order.argsort()
        slots, valid = [], []
        start = 0
        for end in self.offset.tolist():
            count = end - start
            number = torch.arange(-(-count // PATCH) * PATCH)
            slots.append(torch.where(number < count, number + start, start))
            valid.append(number < count)
            start = end
        self.patch_slots = torch.cat(slots).view(-1, PATCH)
        self.patch_valid = torch.cat(valid).view(-1, PATCH)

    def sparsify(self) -> None:
        cell = self.grid_coord + 1  # a free cell around all
        key = _key(cell, self.batch)
        direction = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
        wanted = _key(cell[:, None] + direction, self.batch[:, None])
        order = key.argsort()
        place = torch.searchsorted(key[order], wanted).clamp(max=len(key) - 1)
        neighbours = torch.where(key[order][place] == wanted, order[place], len(key))
        self.sparse_conv_feat = SparseTensor(self.feat, neighbours)


def _z_code(cell: Tensor) -> Tensor:
    """The bits of the three coordinates in turn."""
    bits = [(cell[:, axis] >> bit & 1) << (3 * bit + axis) for bit in range(GRID.bit_length()) for axis in range(3)]
    return torch.stack(bits).sum(0)


def _key(cell: Tensor, batch: Tensor) -> Tensor:
    x, y, z = cell.unbind(-1)
    side = GRID + 2
    return ((batch * side + x) * side + y) * side + z


class PointModule(nn.Module):
    """A module that takes a Point and gives a Point."""


class SparseConv(nn.Module):
    """A convolution over the 27 cells around each."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, 27, width))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, sparse: SparseTensor) -> SparseTensor:
        padded = torch.cat([sparse.features, sparse.features.new_zeros(1, sparse.features.shape[1])])
        around = padded[sparse.neighbours].flatten(1)
        return sparse.replace_feature(nn.functional.linear(around, self.weight.flatten(1), self.bias))


class PointSequential(PointModule):
    """A chain of modules, each of which gets of the Point what its class wants."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, point: Point) -> Point:
        for module in self.children():
            if isinstance(module, PointModule):
                point = module(point)
            elif isinstance(module, SparseConv):
                point.sparse_conv_feat = module(point.sparse_conv_feat)
                point.feat = point.sparse_conv_feat.features
            else:
                point.feat = module(point.feat)
                point.sparse_conv_feat = point.sparse_conv_feat.replace_feature(point.feat)
        return point


def _chain(*modules: nn.Module) -> PointSequential:
    return PointSequential({str(i): module for i, module in enumerate(modules)})


class SerializedAttention(PointModule):
    def __init__(self, width: int, heads: int, order_index: int) -> None:
        super().__init__()
        self.heads = heads
        self.order_index = order_index
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, point: Point) -> Point:
        slots = point.serialized_order[self.order_index][point.patch_slots]
        q, k, v = self.qkv(point.feat)[slots].unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=point.patch_valid[:, None, None])
        mixed = mixed.transpose(1, 2).flatten(2)[point.patch_valid]
        point.feat = self.proj(mixed[point.serialized_inverse[self.order_index]])
        return point


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(PointModule):
    """A convolution that tells positions, attention, MLP; the Point is changed in place."""

    def __init__(self, width: int, heads: int, order_index: int) -> None:
        super().__init__()
        self.cpe = _chain(SparseConv(width, width), nn.Linear(width, width), nn.LayerNorm(width))
        self.norm1 = _chain(nn.LayerNorm(width))
        self.attn = SerializedAttention(width, heads, order_index)
        self.norm2 = _chain(nn.LayerNorm(width))
        self.mlp = _chain(Mlp(width))

    def forward(self, point: Point) -> Point:
        for branch in ((self.cpe,), (self.norm1, self.attn), (self.norm2, self.mlp)):
            shortcut = point.feat
            for module in branch:
                point = module(point)
            point.feat = shortcut + point.feat
        point.sparse_conv_feat = point.sparse_conv_feat.replace_feature(point.feat)
        return point


class ConvBlock(PointModule):
    """A convolution and an MLP, and no attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _chain(nn.LayerNorm(width), SparseConv(width, width))
        self.mlp = _chain(nn.LayerNorm(width), Mlp(width))

    def forward(self, point: Point) -> Point:
        for branch in (self.conv, self.mlp):
            shortcut = point.feat
            point = branch(point)
            point.feat = shortcut + point.feat
            point.sparse_conv_feat = point.sparse_conv_feat.replace_feature(point.feat)
        return point


class GridPooling(PointModule):
    """Cells twice as wide: the means of the coordinates and the maxima of the features in each."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, out)
        self.norm = _chain(nn.BatchNorm1d(out))
        self.act = _chain(nn.GELU())

    def forward(self, point: Point) -> Point:
        cell = point.grid_coord >> 1
        _, inverse = _key(cell, point.batch).unique(return_inverse=True)
        count = int(inverse.max()) + 1

        def pooled(values: Tensor, how: str) -> Tensor:
            index = inverse[:, None].expand_as(values)
            out = values.new_zeros(count, values.shape[1])
            return out.scatter_reduce(0, index, values, how, include_self=False)

        batch = pooled(point.batch[:, None], "amax")[:, 0]
        coarse = Point(
            coord=pooled(point.coord, "mean"),
            grid_coord=pooled(cell, "amax"),
            feat=pooled(self.proj(point.feat), "amax"),
            batch=batch,
            offset=batch.bincount().cumsum(0),
            pooling_inverse=inverse,
            pooling_parent=point,
        )
        coarse.serialize()
        coarse.sparsify()
        pooled_point: Point = self.act(self.norm(coarse))
        return pooled_point


class GridUnpooling(PointModule):
    """Back to the points that were pooled, with what they were and what their cell has become."""

    def __init__(self, width: int, skip: int, out: int) -> None:
        super().__init__()
        self.proj = _chain(nn.Linear(width, out), nn.BatchNorm1d(out), nn.GELU())
        self.proj_skip = _chain(nn.Linear(skip, out), nn.BatchNorm1d(out), nn.GELU())

    def forward(self, point: Point) -> Point:
        parent = self.proj_skip(point.pooling_parent)
        parent.feat = parent.feat + self.proj(point).feat[point.pooling_inverse]
        parent.sparse_conv_feat = parent.sparse_conv_feat.replace_feature(parent.feat)
        assert isinstance(parent, Point)
        return parent


class PointTransformerV3(nn.Module):
    """Logits (n, c) of each point of packed clouds."""

    def __init__(self, narrow: int = 16, wide: int = 24) -> None:
        super().__init__()
        self.embedding = _chain(SparseConv(6, narrow), nn.BatchNorm1d(narrow), nn.GELU())
        fine = OrderedDict[str, nn.Module](block0=Block(narrow, 2, 0), block1=Block(narrow, 2, 1))
        coarse = OrderedDict[str, nn.Module](
            down=GridPooling(narrow, wide), block0=Block(wide, 4, 0), block1=Block(wide, 4, 1)
        )
        up = OrderedDict[str, nn.Module](up=GridUnpooling(wide, narrow, narrow), block0=Block(narrow, 2, 0))
        self.enc = PointSequential({"enc0": PointSequential(fine), "enc1": PointSequential(coarse)})
        self.dec = PointSequential({"dec0": PointSequential(up)})
        self.seg_head = nn.Linear(narrow, CLASSES)

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        point = Point(data)
        point.serialize()
        point.sparsify()
        point = self.dec(self.enc(self.embedding(point)))
        logits: Tensor = self.seg_head(point.feat)
        return logits


class LitePT(nn.Module):
    """Convolutions where there are many points, attention where there are few; logits (n, c) of what both have made."""

    def __init__(self, narrow: int = 16, wide: int = 24) -> None:
        super().__init__()
        self.embedding = _chain(SparseConv(6, narrow), nn.BatchNorm1d(narrow), nn.GELU())
        fine = OrderedDict[str, nn.Module](block0=ConvBlock(narrow), block1=ConvBlock(narrow))
        coarse = OrderedDict[str, nn.Module](
            down=GridPooling(narrow, wide), block0=Block(wide, 4, 0), block1=Block(wide, 4, 1)
        )
        self.enc = PointSequential({"enc0": PointSequential(fine), "enc1": PointSequential(coarse)})
        self.seg_head = nn.Linear(narrow + wide, CLASSES)

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        point = Point(data)
        point.serialize()
        point.sparsify()
        point = self.enc(self.embedding(point))
        logits: Tensor = self.seg_head(torch.cat([point.pooling_parent.feat, point.feat[point.pooling_inverse]], dim=1))
        return logits


_segmentation: dict[str, Any] = {
    "inputs": voxel_dict,
    "slice": slice_offset,
    "select": lambda output: output.unflatten(0, (-1, POINTS)),
    "heads": ("seg_head",),
    "kind": "packed",
}


@register(**_segmentation, other_head=linear_head(16))
def pointcept_ptv3() -> nn.Module:
    """A mutable Point through everything; containers that ask for classes; features held twice; a decoder of blocks."""
    return PointTransformerV3()


@register(**_segmentation, other_head=linear_head(40))
def litept() -> nn.Module:
    """The first stage has no attention, so that nothing is put into it; written after the model of this name."""
    return LitePT()
