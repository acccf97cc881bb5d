"""The Z-order curve through the cells of a cube, also named after Morton: what follows one another on it lies near."""

import torch
from torch import Tensor

from point_peft.geometry.offsets import samples_of

# Bits of a coordinate that count: 1,024 cells along the longest side of a cloud.
BITS = 10
# Shifts and masks that spread 21 bits over 63.
_SHIFTS = (32, 16, 8, 4, 2)
_MASKS = (0x001F00000000FFFF, 0x001F0000FF0000FF, 0x100F00F00F00F00F, 0x10C30C30C30C30C3, 0x1249249249249249)


def morton_order(points: Tensor) -> Tensor:
    """The order (b, g) of the points (b, g, 3) of each cloud along a Z-order curve; equal cells by number.

    A cell is 1 / 1,023 of the longest side of the box around the cloud, whose smallest corner is the curve's first
    cell. A cloud's order depends on its own points alone. No gradient.
    """
    points = _at_least_single(points)
    low, high = points.amin(dim=1, keepdim=True), points.amax(dim=1, keepdim=True)
    return interleaved(_cells(points - low, (high - low).amax(dim=2, keepdim=True))).argsort(dim=1, stable=True)


def ragged_morton_order(points: Tensor, offset: Tensor) -> Tensor:
    """The order (n,) of packed points (n, 3) along such a curve through each sample, sample after sample.

    `offset` (b,) holds where each sample ends. Raises if it does not divide n.
    """
    points, own = _at_least_single(points), samples_of(offset, len(points))
    low, side = cubes(points, own, len(offset))
    return (own << 3 * BITS | interleaved(_cells(points - low[own], side[own]))).argsort(stable=True)


def cubes(points: Tensor, own: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The smallest corner (b, 3) and the side (b, 1) of a cube around the points (n, 3) of each sample `own` (n,)."""
    corner, where = points.new_zeros(samples, 3), own[:, None].expand_as(points)
    low = corner.scatter_reduce(0, where, points, "amin", include_self=False)
    high = corner.scatter_reduce(0, where, points, "amax", include_self=False)
    return low, (high - low).amax(dim=1, keepdim=True)


def interleaved(cells: Tensor) -> Tensor:
    """The places (...) on the curve of cells (..., 3) with coordinates of up to 21 bits.

    Of each bit, from the most significant on, that of x comes first, then that of y and that of z.
    """
    # Two zero bits between any two bits of a coordinate.
    for shift, mask in zip(_SHIFTS, _MASKS, strict=True):
        cells = (cells | cells << shift) & mask
    x, y, z = cells.unbind(dim=-1)
    place: Tensor = x << 2 | y << 1 | z
    return place


def _at_least_single(points: Tensor) -> Tensor:
    return points.detach().to(torch.promote_types(points.dtype, torch.float32))


def _cells(points: Tensor, side: Tensor) -> Tensor:
    """Cells (..., 3) of points whose coordinates are 0 to `side`; the first for what is nowhere (NaN)."""
    share = (points / side.where(side > 0, 1.0)).nan_to_num(0.0).clamp(0.0, 1.0)
    cells: Tensor = (share * (2**BITS - 1)).long()
    return cells
