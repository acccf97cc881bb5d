"""Checks that functions on points share."""

import torch
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
