"""Stand-ins for packages on a CPU, with what PyPI has: operators in pure torch, imports that raise no warning."""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
import warnings
from importlib.util import find_spec
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from point_peft import geometry


def supply_pyg_operators() -> None:
    """Some functions of torch_geometric need pyg-lib, which PyPI lacks: put in their places what serves here."""
    import torch_geometric.nn.pool

    torch_geometric.nn.pool.fps = fps
    torch_geometric.nn.pool.knn = knn
    torch_geometric.nn.pool.knn_graph = knn_graph
    torch_geometric.nn.pool.voxel_grid = voxel_grid


@functools.cache
def supply_torchvision_schemas() -> torch.library.Library:
    """PyPI's torchvision does not import beside a CPU torch unless these two operators are declared before."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # the declarations last as long as it


@functools.cache
def supply_ocnn() -> None:
    """Import ocnn, where it is installed, before torch_pointcloud does, whose classes of octrees derive from its."""
    if find_spec("ocnn") is None:
        return
    supply_torchvision_schemas()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("ocnn")


@functools.cache
def supply_spconv_on_cpu() -> None:
    """Import spconv. On a CPU its kernels are right (on one thread), but two things around them are not.

    In eval mode it wants to add the bias within the kernel, which there is only for CUDA: so the convolutions are
    computed as in training, which adds it afterwards. The backward pass asks for a CUDA stream, which it does not use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spconv.pytorch.ops
    from spconv.pytorch.conv import SparseConvolution

    if torch.cuda.is_available():
        return
    forward = SparseConvolution._conv_forward

    def as_in_training(self: Any, training: bool, *args: Any, **options: Any) -> Any:
        return forward(self, True, *args, **options)

    SparseConvolution._conv_forward = as_in_training
    spconv.pytorch.ops.get_current_stream = lambda: 0


@functools.cache
def supply_openpoints_operators() -> None:
    """Import openpoints, and put what serves here in the places of its operators that are written for CUDA only."""
    supply_torchvision_schemas()
    with warnings.catch_warnings(), mock.patch("inspect.stack", _frames):
        warnings.simplefilter("ignore")
        from openpoints.models.layers import group, group_embed

    group_embed.furthest_point_sample = geometry.farthest_point_sample
    group.grouping_operation = group_features


def _frames() -> list[tuple[FrameType]]:
    """`inspect.stack` without the lines of source, for which it looks through every module that is imported.

    openpoints asks it, once for each of its registries, which package it is; that takes a second each time.
    """
    return [(frame,) for frame, _ in traceback.walk_stack(sys._getframe(1))]


def group_features(features: Tensor, index: Tensor) -> Tensor:
    """The features (b, c, m, k) at indices (b, m, k) among those of all points (b, c, n)."""
    return geometry.gather(features.transpose(1, 2), index.long()).permute(0, 3, 1, 2)


def fps(
    src: Tensor,
    batch: Tensor | None = None,
    ratio: float = 0.5,
    random_start: bool = True,
    batch_size: int | None = None,
) -> Tensor:
    """Indices of ceil(ratio * n) farthest points of each sample, in order of choice; the first may be random."""
    batch = torch.zeros(len(src), dtype=torch.int64) if batch is None else batch
    chosen = []
    for sample in range(int(batch.max()) + 1 if batch_size is None else batch_size):
        own = (batch == sample).nonzero()[:, 0]
        first = int(torch.randint(len(own), ())) if random_start else 0
        order = torch.cat([own[first : first + 1], own[:first], own[first + 1 :]])
        count = -int(-ratio * len(own) // 1)
        chosen.append(order[geometry.farthest_point_sample(src[order][None], count)[0]])
    return torch.cat(chosen)


def knn(
    x: Tensor, y: Tensor, k: int, batch_x: Tensor | None = None, batch_y: Tensor | None = None, **options: Any
) -> Tensor:
    """(query, neighbour) index pairs (2, ...) of the k points of x nearest to each point of y, nearest first.

    A query in a sample of fewer than k points has as many neighbours as there are.
    """
    batch_x = torch.zeros(len(x), dtype=torch.int64) if batch_x is None else batch_x
    batch_y = torch.zeros(len(y), dtype=torch.int64) if batch_y is None else batch_y
    distance = (y[:, None] - x[None]).square().sum(2).masked_fill(batch_y[:, None] != batch_x[None], float("inf"))
    near = distance.topk(min(k, len(x)), largest=False)
    query, rank = near.values.isfinite().nonzero(as_tuple=True)
    return torch.stack([query, near.indices[query, rank]])


def knn_graph(x: Tensor, k: int, batch: Tensor | None = None, loop: bool = False, **options: Any) -> Tensor:
    """(neighbour, point) index pairs (2, ...) of the k points nearest to each point; with `loop` it is one of them."""
    point, neighbour = knn(x, x, k if loop else k + 1, batch, batch)
    kept = torch.ones_like(point, dtype=torch.bool) if loop else point != neighbour
    return torch.stack([neighbour[kept], point[kept]])


def voxel_grid(pos: Tensor, size: float, batch: Tensor | None = None, start: Any = None, end: Any = None) -> Tensor:
    """Numbers of the cells that the points lie in: by sample, then by the last axis; the first axis counts fastest."""
    batch = torch.zeros(len(pos), dtype=torch.int64) if batch is None else batch
    cell = ((pos - (pos.amin(0) if start is None else start)) / size).floor().long()
    extent = cell.amax(0) + 1
    number = batch
    for axis in reversed(range(pos.shape[1])):
        number = number * extent[axis] + cell[:, axis]
    return number
