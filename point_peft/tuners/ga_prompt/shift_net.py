"""The ShiftNet of GAPrompt: a small PointNet++ that moves the points of a cloud and describes its shape."""

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft import geometry
from point_peft.parts.batch_norm import BatchNorm

FREQUENCIES = 4
# Channels of one centre of the second level in the code, and the channels inside.
CODE_CHANNELS = 8
FIRST_LEVEL = (64, 32, 64)
SECOND_LEVEL = (64, 32, CODE_CHANNELS)
TO_FIRST_LEVEL = (64, 32)
TO_POINTS = (32, 32)
SHIFT_WIDTH = 64
# How many centres features are interpolated from, and the guard against a distance of zero.
SOURCES = 32
GUARD = 1e-4


def encode(points: Tensor) -> Tensor:
    """[x, sin x, cos x, sin 2x, cos 2x, ..., cos 8x] of points (b, n, 3), as (b, n, 27)."""
    angles = points[:, :, None] * 2.0 ** torch.arange(FREQUENCIES, dtype=points.dtype, device=points.device)[:, None]
    waves = torch.stack([angles.sin(), angles.cos()], dim=3)
    return torch.cat([points, rearrange(waves, "b n f wave xyz -> b n (f wave xyz)")], dim=2)


class PointMlp(nn.Module):
    """Linear layers with BatchNorm and ReLU on each point's features (b, n, c)."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(*pair) for pair in pairwise((inputs, *widths)))
        self.norms = nn.ModuleList(BatchNorm(width) for width in widths)

    def forward(self, features: Tensor, *, recomputing: bool) -> Tensor:
        rows = rearrange(features, "b n c -> (b n) c")
        for linear, norm in zip(self.linears, self.norms, strict=True):
            assert isinstance(norm, BatchNorm)
            rows = nn.functional.relu(norm.normalise(linear(rows), recomputing=recomputing))
        return rearrange(rows, "(b n) c -> b n c", n=features.shape[1])


class ShiftNet(nn.Module):
    """Two levels of pooling, two of interpolation back to the points, and a shift of each from its features."""

    def __init__(self, centres: int, neighbours: int, *, identity: bool) -> None:
        super().__init__()
        self.centres = centres
        self.neighbours = neighbours
        inputs = 3 + 6 * FREQUENCIES
        self.first_level = PointMlp(inputs, FIRST_LEVEL)
        self.second_level = PointMlp(FIRST_LEVEL[-1], SECOND_LEVEL)
        self.to_first_level = PointMlp(FIRST_LEVEL[-1] + SECOND_LEVEL[-1], TO_FIRST_LEVEL)
        self.to_points = PointMlp(inputs + TO_FIRST_LEVEL[-1], TO_POINTS)
        last = nn.Linear(SHIFT_WIDTH, 3)
        if identity:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.shift = nn.Sequential(nn.Linear(TO_POINTS[-1], SHIFT_WIDTH), nn.ReLU(), last)

    @property
    def code_width(self) -> int:
        """The channels of the code."""
        return self.centres // 2 * CODE_CHANNELS

    def forward(self, points: Tensor, *, recomputing: bool) -> tuple[Tensor, Tensor]:
        """Shifts (b, n, 3) of points (b, n, 3) and the code (b, w) of their shape.

        A cloud of fewer points than centres has a code that ends in zeros.
        """
        encoded = encode(points)
        first, near = _level(points, self.centres, self.neighbours)
        features = _pool(self.first_level(encoded, recomputing=recomputing), near)
        second, near = _level(first, self.centres // 2, self.neighbours // 2)
        coarse = _pool(self.second_level(features, recomputing=recomputing), near)
        code = rearrange(coarse, "b s c -> b (s c)")
        back = torch.cat([features, _interpolate(coarse, second, first)], dim=2)
        back = _interpolate(self.to_first_level(back, recomputing=recomputing), first, points)
        back = self.to_points(torch.cat([encoded, back], dim=2), recomputing=recomputing)
        return self.shift(back), nn.functional.pad(code, (0, self.code_width - code.shape[1]))


def _level(points: Tensor, centres: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Centres (b, s, 3) among points (b, n, 3), and the indices (b, s, k) of the points nearest to each."""
    n = points.shape[1]
    chosen = geometry.gather(points, geometry.farthest_point_sample(points, min(centres, n)))
    return chosen, geometry.knn(chosen, points, min(neighbours, n))


def _pool(features: Tensor, near: Tensor) -> Tensor:
    """The maximum (b, s, c) of features (b, n, c) over neighbourhoods (b, s, k)."""
    # Unlike amax, max keeps only the indices for the backward pass.
    return geometry.gather(features, near).max(dim=2).values


def _interpolate(features: Tensor, sources: Tensor, queries: Tensor) -> Tensor:
    k = min(SOURCES, sources.shape[1])
    return geometry.nearest_interpolate(features, sources, queries, k, GUARD)
