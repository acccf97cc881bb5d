"""Distances, gathering and interpolation on dense clouds (b, n, 3)."""

import torch
from einops import rearrange
from torch import Tensor

from point_peft.errors import PointPeftError


def wide(points: Tensor) -> Tensor:
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def check_points(points: Tensor, name: str) -> None:
    if points.ndim != 3 or points.shape[2] != 3:
        raise PointPeftError(f"{name} must be (b, n, 3), got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise PointPeftError(f"{name} must be floating point, got {points.dtype}")
    if points.shape[1] == 0:
        raise PointPeftError(f"{name} holds no points: {tuple(points.shape)}")


def check_same_batch(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.shape[0] != b.shape[0]:
        raise PointPeftError(f"{name_a} and {name_b} differ in batch size: {a.shape[0]} and {b.shape[0]}")


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances between the points of `a` (b, m, 3) and of `b` (b, n, 3), as (b, m, n).

    Differentiable in both; the gradient at distance zero is zero.
    """
    check_points(a, "a")
    check_points(b, "b")
    check_same_batch(a, b, "a", "b")
    a, b = wide(a), wide(b)
    dx, dy, dz = (a[:, :, None, axis] - b[:, None, :, axis] for axis in range(3))
    return dx * dx + dy * dy + dz * dz


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


def interpolate(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (b, m, c) of source features (b, s, c) under weights (b, m, s)."""
    fitting = features.ndim == weights.ndim == 3 and features.shape[:2] == weights.shape[::2]
    if not fitting:
        raise PointPeftError(
            "interpolate: features must be (b, s, c) and weights (b, m, s), "
            f"got {tuple(features.shape)} and {tuple(weights.shape)}"
        )
    return torch.bmm(weights.to(features.dtype), features)


def rows_of_all(index: Tensor, n: int) -> Tensor:
    """Indices (b, ...) into the n rows of each sample, as indices into the (b n) rows of all samples."""
    first = torch.arange(index.shape[0], device=index.device) * n
    return index + first.reshape(-1, *[1] * (index.ndim - 1))
