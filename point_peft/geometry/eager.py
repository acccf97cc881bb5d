"""Sampling and neighbours as they are computed in eager mode."""

import torch
from einops import rearrange
from torch import Tensor

from point_peft.geometry.dense import gather, squared_distance

try:
    import torch_fps
except ImportError:  # the extra "fast"
    torch_fps = None
# Distances that one chunk of knn holds at a time: 4 MB of float32, about a core's cache.
CHUNK_ELEMENTS = 2**20


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
