"""Sampling and neighbours for compilers and exporters: one call in their graph, or a loop."""

import torch
from einops import rearrange
from torch import Tensor

from point_peft.geometry.eager import farthest_in_loop, nearest_in_chunks
from point_peft.torch_private import scan

CAN_SCAN = scan is not None


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
