"""Pure batched functions on point clouds: distances, sampling, neighbours, interpolation.

Every function treats each cloud of the batch on its own, so a sample's result does not depend on its batch mates.
Distances are taken from coordinate differences: the expanded form `|a|^2 - 2ab + |b|^2` is wrong by 0.026 on a cloud
that lies 100 units from the origin. Half precision inputs are widened to float32 first.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.errors import PointPeftError

try:
    import torch_fps
except ImportError:  # the extra "fast"
    torch_fps = None
try:
    from torch._higher_order_ops.scan import scan
except ImportError:  # torch 2.4 and 2.5
    scan = None  # type: ignore[assignment]

# Distances that one chunk of knn holds at a time: 4 MB of float32, about a core's cache.
CHUNK_ELEMENTS = 2**20


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances between the points of `a` (b, m, 3) and of `b` (b, n, 3), as (b, m, n).

    Differentiable in both; the gradient at distance zero is zero.
    """
    _check_points(a, "a")
    _check_points(b, "b")
    _check_same_batch(a, b, "a", "b")
    a, b = _wide(a), _wide(b)
    dx, dy, dz = (a[:, :, None, axis] - b[:, None, :, axis] for axis in range(3))
    return dx * dx + dy * dy + dz * dz


def farthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Indices (b, count) of `count` points of each cloud (b, n, 3), each the farthest from those chosen before it.

    The first is always point 0; of equally far points the one with the lowest index is taken. No gradient.
    """
    _check_points(points, "points")
    if not 1 <= count <= points.shape[1]:
        raise PointPeftError(f"farthest_point_sample: cannot choose {count} of {points.shape[1]} points")
    points = _wide(points.detach())
    if torch.compiler.is_dynamo_compiling():
        # One call in the graph: unrolled, the loop takes long to compile, and inductor of torch 2.13 gets it wrong.
        sampled: Tensor = _farthest_op(points, count)
        return sampled
    if torch.compiler.is_compiling() and scan is not None:
        return _farthest_by_scan(points, count)
    return _farthest(points, count)


def _farthest(points: Tensor, count: int) -> Tensor:
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


def _farthest_by_scan(points: Tensor, count: int) -> Tensor:
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


def _farthest_by_torch_fps(points: Tensor, count: int) -> Tensor:
    every = points.new_ones(points.shape[:2], dtype=torch.bool)
    index: Tensor = torch_fps.farthest_point_sampling(
        points, every, count, random_start=False, validate=False, assume_finite=True
    )
    # Where all points are at the place of a chosen one, it goes on with those not chosen yet, and we with the first.
    chosen = gather(points, index)
    again = (squared_distance(chosen, chosen) == 0).tril(-1).any(dim=2)
    return index.masked_fill(again, 0)


_farthest_op = torch.library.custom_op(
    "point_peft::farthest_point_sample", _farthest, mutates_args=(), schema="(Tensor points, SymInt count) -> Tensor"
)


@_farthest_op.register_fake
def _(points: Tensor, count: int) -> Tensor:
    return points.new_empty(points.shape[0], count, dtype=torch.int64)


def knn(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Indices (b, m, k) of the `k` points (b, n, 3) nearest to each query (b, m, 3), nearest first. No gradient.

    Works through the queries in chunks, so memory grows with m * k + n and not with m * n.
    """
    _check_points(queries, "queries")
    _check_points(points, "points")
    _check_same_batch(queries, points, "queries", "points")
    if not 1 <= k <= points.shape[1]:
        raise PointPeftError(f"knn: cannot choose {k} of {points.shape[1]} points")
    return _nearest(queries, points, k)


def feature_knn(features: Tensor, k: int) -> Tensor:
    """Indices (b, g, k) of the `k` features (b, g, c) nearest to each of them, nearest first. No gradient."""
    if features.ndim != 3 or not 1 <= k <= features.shape[1]:
        raise PointPeftError(f"feature_knn: cannot choose {k} of features (b, g, c) of shape {tuple(features.shape)}")
    return _nearest(features, features, k)


def _nearest(queries: Tensor, points: Tensor, k: int) -> Tensor:
    queries, points = _wide(queries.detach()), _wide(points.detach())
    if torch.compiler.is_dynamo_compiling():
        nearest: Tensor = _nearest_op(queries, points, k)
        return nearest
    if torch.compiler.is_compiling():
        # By torch.export: ONNX has no cdist, and the number of chunks would fix that of the clouds.
        with torch.no_grad():
            distance = torch.linalg.vector_norm(queries[:, :, None] - points[:, None], dim=3)
            index: Tensor = distance.topk(k, largest=False).indices
            return index
    return _nearest_in_chunks(queries, points, k)


def _nearest_in_chunks(queries: Tensor, points: Tensor, k: int) -> Tensor:
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


@torch.library.custom_op(
    "point_peft::nearest", mutates_args=(), schema="(Tensor queries, Tensor points, SymInt k) -> Tensor"
)
def _nearest_op(queries: Tensor, points: Tensor, k: int) -> Tensor:
    return _nearest_in_chunks(queries, points, k)


@_nearest_op.register_fake
def _(queries: Tensor, points: Tensor, k: int) -> Tensor:
    return points.new_empty(*queries.shape[:2], k, dtype=torch.int64)


def gather(features: Tensor, index: Tensor) -> Tensor:
    """Rows of `features` (b, n, c) chosen per sample by `index` (b, ...), as (b, ..., c). Differentiable in features.

    Every index must lie in 0 .. n-1; this is not checked, because a check would stop a GPU at every call.
    """
    if features.ndim != 3 or index.ndim < 1 or features.shape[0] != index.shape[0]:
        raise PointPeftError(
            "gather: features must be (b, n, c) and index (b, ...), "
            f"got {tuple(features.shape)} and {tuple(index.shape)}"
        )
    rows = rearrange(features, "b n c -> (b n) c").index_select(0, rows_of_all(index, features.shape[1]).flatten())
    return rows.reshape(*index.shape, features.shape[2])


def inverse_distance_weights(queries: Tensor, sources: Tensor, eps: float = 1e-8) -> Tensor:
    """Weights (b, m, s) of the sources (b, s, 3) at each query (b, m, 3): `1 / (d^2 + eps)`, scaled to sum to one.

    Differentiable in both.
    """
    # Both terms over eps, which cancels out: the exporter to ONNX takes an addend of 1e-8 for zero.
    weights = (squared_distance(queries, sources) / eps + 1.0).reciprocal()
    return weights / weights.sum(dim=2, keepdim=True)


def gradient_to_sources(
    gradient: Tensor, weights: Tensor, queries: Tensor, sources: Tensor, eps: float = 1e-8
) -> Tensor:
    """The gradient to the sources (b, s, 3) of that to the `inverse_distance_weights` (b, m, s) of queries (b, m, 3).

    With u = 1 / (d^2 + eps) and w = u / sum u it is the sum over the queries of -2 u w (g - sum g w) (source - query).
    """
    x, y, z = (_wide(sources)[:, None, :, axis] - _wide(queries)[:, :, None, axis] for axis in range(3))
    square = (x * x).addcmul_(y, y).addcmul_(z, z)
    to_square = (gradient - (gradient * weights).sum(dim=2, keepdim=True)).mul_(weights).div_(square.add_(eps))
    return torch.stack([(to_square * offset).sum(dim=1) for offset in (x, y, z)], dim=2).mul_(-2.0)


def interpolate(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (b, m, c) of source features (b, s, c) under weights (b, m, s)."""
    fitting = features.ndim == weights.ndim == 3 and features.shape[:2] == weights.shape[::2]
    if not fitting:
        raise PointPeftError(
            "interpolate: features must be (b, s, c) and weights (b, m, s), "
            f"got {tuple(features.shape)} and {tuple(weights.shape)}"
        )
    return torch.bmm(weights.to(features.dtype), features)


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
    offset = _wide(gather(sources, index)) - _wide(queries)[:, :, None]
    weights = (offset.square().sum(dim=3) / eps + 1.0).reciprocal()
    weights = weights / weights.sum(dim=2, keepdim=True)
    # The weighted sum over rows in one fused step: no copy of c channels per neighbour.
    summed = nn.functional.embedding_bag(
        rearrange(rows_of_all(index, sources.shape[1]), "b m k -> (b m) k"),
        rearrange(features, "b s c -> (b s) c"),
        mode="sum",
        per_sample_weights=rearrange(weights, "b m k -> (b m) k").to(features.dtype),
    )
    return rearrange(summed, "(b m) c -> b m c", m=queries.shape[1])


def rows_of_all(index: Tensor, n: int) -> Tensor:
    """Indices (b, ...) into the n rows of each sample, as indices into the (b n) rows of all samples."""
    first = torch.arange(index.shape[0], device=index.device) * n
    return index + first.reshape(-1, *[1] * (index.ndim - 1))


def _wide(points: Tensor) -> Tensor:
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def _check_points(points: Tensor, name: str) -> None:
    if points.ndim != 3 or points.shape[2] != 3:
        raise PointPeftError(f"{name} must be (b, n, 3), got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise PointPeftError(f"{name} must be floating point, got {points.dtype}")
    if points.shape[1] == 0:
        raise PointPeftError(f"{name} holds no points: {tuple(points.shape)}")


def _check_same_batch(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.shape[0] != b.shape[0]:
        raise PointPeftError(f"{name_a} and {name_b} differ in batch size: {a.shape[0]} and {b.shape[0]}")
