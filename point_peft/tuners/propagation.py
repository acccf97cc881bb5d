"""Propagation of features: neighbourhoods of tokens are pooled, and their centres give to all patches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft import geometry, ragged
from point_peft.context import Forward
from point_peft.tuners.batch_norm import BatchNorm


@dataclass(frozen=True)
class Neighbourhoods:
    """Centres among tokens (b, l, c) and the tokens nearest to each.

    In packed tokens b is one: all samples are in one row, and no neighbourhood reaches beyond its sample.
    """

    centre: Tensor
    """(b, s)"""
    neighbour: Tensor
    """(b, s, k)"""
    rows: Tensor
    """The neighbours (b s, k) as numbers of rows of all samples' tokens, (b l, c)."""
    centre_rows: Tensor
    """The centres (b, s) as such."""

    @staticmethod
    def among(length: int, centre: Tensor, neighbour: Tensor, before: int = 0) -> Neighbourhoods:
        """Of centres and their neighbours among `length` tokens of each sample, counted from token `before` on."""
        rows = rearrange(geometry.rows_of_all(neighbour + before, length), "b s k -> (b s) k")
        return Neighbourhoods(centre, neighbour, rows, geometry.rows_of_all(centre + before, length))


@dataclass(frozen=True)
class Propagation:
    """How much each of the centres gives to each of the tokens: from all of them, or packed, from the k nearest."""

    weights: Tensor
    """(b, l, s), zero for tokens that lie nowhere; or packed (1, g, k)."""
    nearest: Tensor | None = None
    """Packed: the centres (g, k) that the weights are of."""

    def __call__(self, centres: Tensor) -> Tensor:
        """What features of the centres (b, s, c) propagate to the tokens, (b, l, c)."""
        if self.nearest is None:
            return geometry.interpolate(centres, self.weights)
        return ragged.ragged_interpolate(centres[0], self.nearest, self.weights[0])[None]


class GeometryAwareAdapter(nn.Module):
    """t_i <- t_i + scale * sum_j w_ij (GELU(norm(pool N_j)) + centre_scale * U_j), for the tokens t of a block."""

    def __init__(self, channels: int, *, batch_norm: bool, scale: float, centre_scale: float, gated: bool) -> None:
        super().__init__()
        self.scale = scale
        self.centre_scale = centre_scale
        self.norm: BatchNorm | nn.LayerNorm = BatchNorm(channels) if batch_norm else nn.LayerNorm(channels)
        self.gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(
        self,
        onto: Tensor,
        tokens: Tensor,
        near: Neighbourhoods,
        propagate: Propagation,
        pooled: Tensor,
        *,
        recomputing: bool,
    ) -> Tensor:
        """Tokens `onto` (b, l, c) with what centres among `tokens`, around which these are `pooled`, propagate."""
        if isinstance(self.norm, BatchNorm):
            pooled = self.norm.normalise(pooled, recomputing=recomputing)
        else:
            pooled = self.norm(pooled)
        own = rearrange(tokens, "b l c -> (b l) c").index_select(0, near.centre_rows.flatten()).view(pooled.shape)
        centres = nn.functional.gelu(pooled).add(own, alpha=self.centre_scale)
        # Centres are fewer than tokens, so they are scaled and not what they propagate.
        scale = self.scale if self.gate is None else self.scale * self.gate
        return onto + propagate(scale * centres).to(onto.dtype)


def neighbourhoods(
    forward: Forward,
    stage: int,
    centre_ratio: float,
    k: int,
    ahead: Tensor | None = None,
    owner: Hashable = None,
    before: int = 0,
) -> tuple[Neighbourhoods, Callable[[], Propagation]]:
    """Neighbourhoods among the tokens of a stage, and what tells how their centres propagate to prefix and patches.

    `ahead` (p, 3) are the coordinates of prompts ahead of the patches, which are `owner`'s; `before` these there are
    tokens that lie nowhere, to which nothing is propagated. Once per forward; weights that carry a gradient to
    coordinates are made anew at every call, because what is checkpointed must be able to make them again.
    """
    patches = forward.coordinates[stage]
    # Without prompts nothing depends on the adapter, so all adapters share the result.
    key = ("propagation", stage, None if ahead is None else owner, centre_ratio, k, before)
    if stage in forward.samples:
        found = forward.once(("packed", *key), lambda: _packed(patches, forward.samples[stage], centre_ratio, k))
        return found[0], lambda: found[1]

    def choose() -> Neighbourhoods:
        with torch.no_grad():
            points = coordinates_of(patches, ahead)
            centre = geometry.farthest_point_sample(points, max(1, round(centre_ratio * patches.shape[1])))
            neighbour = geometry.knn(geometry.gather(points, centre), points, min(k, points.shape[1]))
            return Neighbourhoods.among(before + points.shape[1], centre, neighbour, before)

    def weigh() -> Propagation:
        centres = geometry.gather(coordinates_of(patches, ahead), near.centre)
        weights = geometry.inverse_distance_weights(patches, centres)
        return Propagation(nn.functional.pad(weights, (0, 0, before, 0)))

    near = forward.once(("neighbourhoods", *key), choose)
    learned = patches.requires_grad or (ahead is not None and ahead.requires_grad)
    if learned and torch.is_grad_enabled():
        return near, weigh
    return near, lambda: forward.once(("weights", *key), weigh)


def coordinates_of(patches: Tensor, ahead: Tensor | None) -> Tensor:
    """Coordinates (b, p + g, 3) of prompts and patches, of those of the patches (b, g, 3) and of prompts (p, 3)."""
    if ahead is None:
        return patches
    return torch.cat([ahead.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)


def _packed(points: Tensor, samples: Tensor, centre_ratio: float, k: int) -> tuple[Neighbourhoods, Propagation]:
    """The same for packed tokens at points (n, 3).

    A scene has too many centres for all of them to reach every token, so the k nearest do.
    """
    with torch.no_grad():
        order, ends = ragged.gathered(samples, len(points))
        points = points.detach()[order]
        centre, centre_ends = ragged.ragged_farthest_point_sample(points, ends, centre_ratio)
        neighbour = ragged.ragged_knn(points[centre], centre_ends, points, ends, k)
        nearest = ragged.ragged_knn(points, ends, points[centre], centre_ends, k)
        weights = ragged.nearest_weights(points, points[centre], nearest)
        place = order.argsort()
        near = Neighbourhoods.among(len(points), order[centre][None], order[neighbour][None])
        return near, Propagation(weights[place][None], nearest[place])
