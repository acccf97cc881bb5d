"""A small scene encoder, torch-pointcloud's PTv3 as it is, and the form in which it takes a scene.

`load` gives it with the weights beside this file, which `python -m tools.pretrain_scenes` makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.zoo.operators import supply_spconv_on_cpu
from tests.zoo.torch_pointcloud import model_class

WEIGHTS = Path(__file__).with_suffix(".safetensors")
CELL = 0.6
"""Side of a cell, metres."""
FAR = 20.0
"""Coordinates are divided by so many metres."""
IN_CHANNELS = 6
CHANNELS = (32, 64, 128)
ENCODER: dict[str, Any] = {
    "in_channels": IN_CHANNELS,
    "serialization_orders": ("z", "z-trans", "hilbert", "hilbert-trans"),
    "strides": (2, 2),
    "encoder_depths": (2, 2, 2),
    "encoder_channels": CHANNELS,
    "encoder_num_heads": (2, 4, 8),
    "encoder_patch_size": (64, 64, 64),
    "norm": "layer_norm",
    "norm_kwargs": {"mode": "node"},
    "drop_path": 0.1,
    "use_flash_attn": False,
    "pooling": "grid",
    "stem_type": "linear",
}
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Cells(NamedTuple):
    """The cells of a scene that hold points."""

    features: Tensor
    """(n, 6): the mean of a cell's points from the middle of the scene and its lowest ground, in units of 20 m, and
    from the middle of the cell, in cells."""
    grid: Tensor
    """(n, 3)"""
    centroids: Floats
    """(n, 3): the means, metres."""
    cell_of: Indices
    """(points,): the cell that each point lies in."""

    def inputs(self) -> dict[str, Any]:
        """The arguments of the encoder."""
        return inputs(self.features, self.grid, torch.zeros(len(self.grid), dtype=torch.int64))


def inputs(features: Tensor, grid: Tensor, batch: Tensor) -> dict[str, Any]:
    """The arguments of the encoder that make it return its stages."""
    return {"x": features, "pos_grid": grid, "batch": batch, "return_intermediates": True}


def cells_of(points: Floats) -> Cells:
    """The cells of points (m, 3) in metres, z up."""
    origin = points.min(axis=0)
    place = (points - origin) / CELL
    grid, cell_of, count = np.unique(np.floor(place).astype(np.int64), axis=0, return_inverse=True, return_counts=True)
    cell_of = cell_of.reshape(-1)
    mean = np.stack([np.bincount(cell_of, weights=place[:, axis]) for axis in range(3)], axis=1) / count[:, None]
    low = np.percentile(mean[:, 2], 5)
    middle = (mean.max(axis=0) + mean.min(axis=0)) / 2
    from_middle = (mean - [middle[0], middle[1], low]) * CELL / FAR
    features = np.concatenate([from_middle, mean - grid - 0.5], axis=1)
    return Cells(
        torch.from_numpy(features).float(), torch.from_numpy(grid), origin + mean * CELL, cell_of.astype(np.int64)
    )


def encoder() -> nn.Module:
    """The encoder without weights."""
    supply_spconv_on_cpu()
    model: nn.Module = model_class("point_transformer_v3", "PointTransformerV3Encoder")(**ENCODER)
    return model


def load(path: Path = WEIGHTS) -> nn.Module:
    """The pre-trained encoder."""
    model = encoder()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model
