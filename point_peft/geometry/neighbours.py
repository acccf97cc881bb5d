"""Farthest points and nearest neighbours of dense clouds, whoever runs: eager mode, a compiler or an exporter."""

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.errors import PointPeftError
from point_peft.geometry.dense import check_points, check_same_batch, gather, rows_of_all, squared_distance, wide
from point_peft.torch_private import scan

try:
    import torch_fps
except ImportError:  # the extra "fast"
    torch_fps = None
# Distances that one chunk of knn holds at a time: 4 MB of float32, about a core's cache.
CHUNK_ELEMENTS = 2**20


def farthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Indices (b, count) of `count` points of each cloud (b, n, 3), each the farthest from those chosen before it.

    The first is always point 0; of equally far points the one with the lowest index is taken. No gradient.
    """
    check_points(points, "points")
    if not 1 <= count <= points.shape[1]:
        raise PointPeftError(f"farthest_point_sample: cannot choose {count} of {points.shape[1]} points")
    points = wide(points.detach())
    if torch.compiler.is_dynamo_compiling():
        # One call in the graph: unrolled, the loop takes long to compile, and inductor of torch 2.13 gets it wrong.
        sampled: Tensor = farthest_op(points, count)
        return sampled
    if torch.compiler.is_compiling() and scan is not None:
        return farthest_by_scan(points, count)
    return farthest_in_loop(points, count)


def knn(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Indices (b, m, k) of the `k` points (b, n, 3) nearest to each query (b, m, 3), nearest first. No gradient.

    Works through the queries in chunks, so memory grows with m * k + n and not with m * n.
    """
    check_points(queries, "queries")
    check_points(points, "points")
    check_same_batch(queries, points, "queries", "points")
    if not 1 <= k <= points.shape[1]:
        raise PointPeftError(f"knn: cannot choose {k} of {points.shape[1]} points")
    return _nearest(queries, points, k)


def feature_knn(features: Tensor, k: int) -> Tensor:
    """Indices (b, g, k) of the `k` features (b, g, c) nearest to each of them, nearest first. No gradient."""
    if features.ndim != 3 or not 1 <= k <= features.shape[1]:
        raise PointPeftError(f"feature_knn: cannot choose {k} of features (b, g, c) of shape {tuple(features.shape)}")
    return _nearest(features, features, k)


def _nearest(queries: Tensor, points: Tensor, k: int) -> Tensor:
    queries, points = wide(queries.detach()), wide(points.detach())
    if torch.compiler.is_dynamo_compiling():
        nearest: Tensor = nearest_op(queries, points, k)
        return nearest
    if torch.compiler.is_compiling():
        # By torch.export: ONNX has no cdist, and the number of chunks would fix that of the clouds.
        with torch.no_grad():
            distance = torch.linalg.vector_norm(queries[:, :, None] - points[:, None], dim=3)
            index: Tensor = distance.topk(k, largest=False).indices
            return index
    return nearest_in_chunks(queries, points, k)


def nearest_interpolate(features: Tensor, sources: Tensor, queries: Tensor, k: int = 3, eps: float = 1e-8) -> Tensor:
    """Features (b, m, c) at queries (b, m, 3) from the `k` nearest of the sources (b, s, 3) with features (b, s, c).

    The neighbours are weighted by `1 / (d^2 + eps)`, scaled to sum to one, as in PointNet++. Differentiable in all.
    """
    if features.ndim != 3 or features.shape[:2] != sources.shape[:2]:
        raise PointPeftError(
            "nearest_interpolate: features must be (b, s, c) and sources (b, s, 3), "
            f"got {tuple(features.shape)} and {tuple(sources.shape)}"
        )
    index = knn(queries, sources, k)
    offset = wide(gather(sources, index)) - wide(queries)[:, :, None]
    weights = (offset.square().sum(dim=3) / eps + 1.0).reciprocal()
    weights = weights / weights.sum(dim=2, keepdim=True)
    # The weighted sum over rows in one fused step: no copy of c channels per neighbour.
    rows = rearrange(rows_of_all(index, sources.shape[1]), "b m k -> (b m) k")
    shares = rearrange(weights, "b m k -> (b m) k").to(features.dtype)
    flat = rearrange(features, "b s c -> (b s) c")
    summed = nn.functional.embedding_bag(rows, flat, mode="sum", per_sample_weights=shares)
    return rearrange(summed, "(b m) c -> b m c", m=queries.shape[1])


def farthest_by_scan(points: Tensor, count: int) -> Tensor:
    """For torch.export and ONNX: a loop in the graph, where the plain one would be `count` copies of its body."""

    def step(state: tuple[Tensor, Tensor], _: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        nearest, last = state
        dx, dy, dz = (axis - axis.gather(1, last[:, None]) for axis in (x, y, z))
        nearest = torch.minimum(nearest, dx * dx + dy * dy + dz * dz)
        return (nearest, nearest.argmax(dim=1)), last.clone()

    with torch.no_grad():
        x, y, z = (axis.clone(memory_format=torch.contiguous_format) for axis in points.unbind(2))
        nearest = points.new_full(points.shape[:2], torch.inf)
        first = torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
        index: Tensor
        _, index = scan(step, (nearest, first), torch.zeros(count, device=points.device))
        return rearrange(index, "count b -> b count")


def farthest_in_loop(points: Tensor, count: int) -> Tensor:
    # Elsewhere it is no faster than the loop below.
    if torch_fps is not None and points.is_cuda and points.dtype == torch.float32:
        return _farthest_by_torch_fps(points, count)
    b = points.shape[0]
    with torch.no_grad():
        # One contiguous plane (b, n) per axis and no allocation in the loop: four times as fast as (b, n, 3).
        planes = rearrange(points, "b n xyz -> xyz b n").contiguous()
        x, y, z = planes.unbind(0)
        nearest = torch.full_like(x, torch.inf)
        distance, square = torch.empty_like(x), torch.empty_like(x)
        index = torch.zeros(b, count, dtype=torch.int64, device=points.device)
        last = index[:, :1].clone()
        for step in range(1, count):
            px, py, pz = planes.gather(2, last.expand(3, b, 1)).unbind(0)
            torch.sub(x, px, out=distance).mul_(distance)
            torch.sub(y, py, out=square)
            distance.addcmul_(square, square)
            torch.sub(z, pz, out=square)
            distance.addcmul_(square, square)
            torch.minimum(nearest, distance, out=nearest)
            last = nearest.argmax(dim=1, keepdim=True)
            index[:, step] = last[:, 0]
        return index


def _farthest_by_torch_fps(points: Tensor, count: int) -> Tensor:
    every = points.new_ones(points.shape[:2], dtype=torch.bool)
    index: Tensor = torch_fps.farthest_point_sampling(
        points, every, count, random_start=False, validate=False, assume_finite=True
    )
    # Where all points are at the place of a chosen one, it goes on with those not chosen yet, and we with the first.
    chosen = gather(points, index)
    again = (squared_distance(chosen, chosen) == 0).tril(-1).any(dim=2)
    return index.masked_fill(again, 0)


def nearest_in_chunks(queries: Tensor, points: Tensor, k: int) -> Tensor:
    b, n, _ = points.shape
    # Autocast would take the distances in half precision.
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        chunk = max(1, CHUNK_ELEMENTS // max(1, b * n))
        # Made ahead: a small result that is kept beside each freed chunk would keep the allocator from using it again.
        nearest = torch.empty(b, queries.shape[1], k, dtype=torch.int64, device=points.device)
        for start in range(0, queries.shape[1], chunk):
            part = queries[:, start : start + chunk]
            distance = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
            nearest[:, start : start + chunk] = distance.topk(k, largest=False).indices
        return nearest


farthest_op = torch.library.custom_op(
    "point_peft::farthest_point_sample",
    farthest_in_loop,
    mutates_args=(),
    schema="(Tensor points, SymInt count) -> Tensor",
)


@farthest_op.register_fake
def _(points: Tensor, count: int) -> Tensor:
    return points.new_empty(points.shape[0], count, dtype=torch.int64)


@torch.library.custom_op(
    "point_peft::nearest", mutates_args=(), schema="(Tensor queries, Tensor points, SymInt k) -> Tensor"
)
def nearest_op(queries: Tensor, points: Tensor, k: int) -> Tensor:
    return nearest_in_chunks(queries, points, k)


@nearest_op.register_fake
def _(queries: Tensor, points: Tensor, k: int) -> Tensor:
    return points.new_empty(*queries.shape[:2], k, dtype=torch.int64)
