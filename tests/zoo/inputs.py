"""Clouds in the forms that the backbones want, and how to take one sample out of a batch of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import Args

POINTS = 96
"""Points in each cloud."""
LABELS = 4


def clouds(batch: int, seed: int) -> Args:
    """Points (b, n, 3)."""
    return (torch.rand(batch, POINTS, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1,)


def labels(batch: int, seed: int) -> Tensor:
    """One-hot object labels (b, LABELS)."""
    return torch.eye(LABELS)[torch.randint(LABELS, (batch,), generator=torch.Generator().manual_seed(seed))]


def labelled_clouds(batch: int, seed: int) -> Args:
    return (*clouds(batch, seed), labels(batch, seed))


def packed_clouds(batch: int, seed: int) -> Args:
    """(features, positions (b * n, 3), sample numbers (b * n)), as torch-pointcloud wants them."""
    return None, clouds(batch, seed)[0].flatten(0, 1), torch.arange(batch).repeat_interleave(POINTS)


def packed_labelled_clouds(batch: int, seed: int) -> Args:
    return (*packed_clouds(batch, seed), labels(batch, seed))


def slice_batch(args: Args, i: int) -> Args:
    return tuple(value[i : i + 1] for value in args)


def slice_packed(args: Args, i: int) -> Args:
    features, positions, samples, *rest = args
    own = samples == i
    features = None if features is None else features[own]
    return features, positions[own], samples[own] - i, *(value[i : i + 1] for value in rest)


def coloured_clouds(batch: int, seed: int) -> Args:
    """Points (b, n, 3) and their colours (b, n, 3)."""
    return (*clouds(batch, seed), clouds(batch, seed + 1000)[0])


def featured_clouds(batch: int, seed: int) -> Args:
    """Points with three more features each (b, n, 6)."""
    return (torch.cat(coloured_clouds(batch, seed), dim=2),)


def partly_filled_clouds(batch: int, seed: int) -> Args:
    """Points (b, n, 3), of which each sample's own are the first; and how many those are (b)."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return (*clouds(batch, seed), torch.randint(POINTS // 2, POINTS + 1, (batch,), generator=generator))


def channels_first_clouds(batch: int, seed: int) -> Args:
    """Points (b, 3, n)."""
    return (clouds(batch, seed)[0].transpose(1, 2),)


GRID = 8
"""Cells along each axis of the grid of `voxel_clouds`."""


def voxel_clouds(batch: int, seed: int) -> Args:
    """(features (b * n, 3), cells (b * n, 3), sample numbers (b * n)); at most one point of a sample in a cell."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.cat([torch.randperm(GRID**3, generator=generator)[:POINTS] for _ in range(batch)])
    cell = torch.stack([number // GRID**2, number // GRID % GRID, number % GRID], dim=1)
    jitter = torch.rand(len(cell), 3, generator=generator)
    return (cell + jitter) / (GRID / 2) - 1, cell, torch.arange(batch).repeat_interleave(POINTS)


def ends(batch: int) -> Tensor:
    """Where each sample of a packed batch ends (b)."""
    return torch.arange(1, batch + 1) * POINTS


def voxel_dict(batch: int, seed: int) -> Args:
    """A dict with the coordinates, cells, features, sample numbers and ends of the samples of packed clouds."""
    coord, cell, samples = voxel_clouds(batch, seed)
    features = torch.cat([coord, clouds(batch, seed + 1000)[0].flatten(0, 1)], dim=1)
    return ({"coord": coord, "grid_coord": cell, "feat": features, "batch": samples, "offset": ends(batch)},)


def offset_dict(batch: int, seed: int) -> Args:
    coord = clouds(batch, seed)[0].flatten(0, 1)
    return ({"coord": coord, "feat": clouds(batch, seed + 1000)[0].flatten(0, 1), "offset": ends(batch)},)


def offset_list(batch: int, seed: int) -> Args:
    """[points (b * n, 3), features (b * n, 3), ends of the samples (b)]."""
    return (list(offset_dict(batch, seed)[0].values()),)


def slice_dict(args: Args, i: int) -> Args:
    return ({name: value[i : i + 1] for name, value in args[0].items()},)


def slice_offset(args: Args, i: int) -> Args:
    """For a dict or list of packed tensors, the last of which holds the ends of the samples."""

    def own(name: str | int, value: Tensor) -> Tensor:
        if name in ("offset", 2):
            return ends(1)
        part = value[i * POINTS : (i + 1) * POINTS]
        return part - i if name == "batch" else part

    (packed,) = args
    if isinstance(packed, dict):
        return ({name: own(name, value) for name, value in packed.items()},)
    return ([own(place, value) for place, value in enumerate(packed)],)
