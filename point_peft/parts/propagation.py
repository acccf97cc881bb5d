"""Propagation of features: neighbourhoods of tokens are pooled, and their centres give to all patches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.parts.batch_norm import batch_norm as normalised
from point_peft.running.forward import Forward


@dataclass(frozen=True)
class Neighbourhoods:
    """Centres among tokens U (b, l, c) and the tokens nearest to each.

    In packed tokens b is one: all samples are in one row, and no neighbourhood reaches beyond its sample.
    """

    centre: Tensor
    """(b, s)"""
    neighbour: Tensor
    """(b, s, k)"""

    def after(self, prefix: int) -> Neighbourhoods:
        """The same among tokens that begin with a prefix, which lies nowhere: without it, U would have to be copied."""
        return Neighbourhoods(self.centre + prefix, self.neighbour + prefix)


@dataclass(frozen=True)
class Propagation:
    """Share that each of the centres gives to each of the tokens: from all of them, or packed, from the k nearest."""

    weights: Tensor
    """(b, g, s), or packed (1, g, k)."""
    nearest: Tensor | None = None
    """Packed: the centres (g, k) that the weights are of."""

    def __call__(self, centres: Tensor) -> Tensor:
        """Features (b, g, c) that those of the centres (b, s, c) propagate to the tokens."""
        if self.nearest is None:
            return geometry.interpolate(centres, self.weights)
        return geometry.ragged_interpolate(centres[0], self.nearest, self.weights[0])[None]


class GeometryAwareAdapter(nn.Module):
    """t_i <- t_i + scale * sum_j w_ij v_j, v_j = GELU(norm(m_j)) + centre_scale * U_j, for the tokens t of a block."""

    def __init__(self, channels: int, *, batch_norm: bool, scale: float, centre_scale: float, gated: bool) -> None:
        super().__init__()
        self.scale = scale
        self.centre_scale = centre_scale
        self.norm = nn.BatchNorm1d(channels) if batch_norm else nn.LayerNorm(channels)
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(
        self, t: Tensor, U: Tensor, near: Neighbourhoods, w: Propagation, m: Tensor, *, recomputing: bool
    ) -> Tensor:
        """t (b, g, c) with what the centres among U (b, l, c) propagate, of m (b, s, c) pooled around them."""
        layer = isinstance(self.norm, nn.LayerNorm)
        normed = self.norm(m) if layer else normalised(self.norm, m, recomputing=recomputing)
        v = nn.functional.gelu(normed).add(geometry.gather(U, near.centre), alpha=self.centre_scale)
        # Centres are fewer than tokens, so they are scaled and not what they propagate.
        v = (self.scale if self.gate is None else self.scale * self.gate) * v
        return t + w(v).to(t.dtype)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Reach of the centres of neighbourhoods: it tells how they propagate, when it is asked."""

    forward: Forward
    key: Hashable
    near: Neighbourhoods
    patches: Tensor
    """Coordinates (b, g, 3)."""
    packed: Propagation | None = None

    def __call__(self, ahead: Tensor | None) -> Propagation:
        """Once per forward; made anew where coordinates are trained, so that checkpointing can make it again.

        `ahead` are the coordinates (p, 3) of prompts ahead of the patches.
        """
        if self.packed is not None:
            return self.packed
        learned = self.patches.requires_grad or (ahead is not None and ahead.requires_grad)
        if learned and torch.is_grad_enabled():
            return Propagation(self._weights(ahead))
        with torch.no_grad():
            return self.forward.once(("weights", self.key), lambda: Propagation(self._weights(ahead)))

    def _weights(self, ahead: Tensor | None) -> Tensor:
        """Share of each centre that goes to each patch, (b, g, s)."""
        centres = geometry.gather(coordinates_of(self.patches, ahead), self.near.centre)
        return geometry.inverse_distance_weights(self.patches, centres)


def neighbourhoods(
    forward: Forward, stage: int, centre_ratio: float, k: int, ahead: Tensor | None = None, owner: Hashable = None
) -> tuple[Neighbourhoods, Reach]:
    """Neighbourhoods among the tokens of a stage, once per forward, and how far their centres reach.

    `ahead` (p, 3) are the coordinates of prompts ahead of the patches, which are `owner`'s.
    """
    patches = forward.seen.coordinates[stage]
    # Without prompts nothing depends on the adapter, so all adapters share the result. Blocks that are called without
    # their model share a forward from one training step to the next, in which the coordinates of prompts have moved.
    tracked = ahead is not None and not torch.compiler.is_compiling() and not ahead.is_inference()
    of = None if ahead is None else (owner, ahead._version if tracked else 0)
    key = ("propagation", stage, of, centre_ratio, k)
    packed = None
    if stage in forward.seen.samples:
        samples = forward.seen.samples[stage]
        near, packed = forward.once(("packed", key), lambda: _packed(patches, samples, centre_ratio, k))
    else:
        near = forward.once(("neighbourhoods", key), lambda: _chosen(patches, ahead, centre_ratio, k))
    return near, Reach(forward=forward, key=key, near=near, patches=patches, packed=packed)


def _chosen(patches: Tensor, ahead: Tensor | None, centre_ratio: float, k: int) -> Neighbourhoods:
    with torch.no_grad():
        points = coordinates_of(patches, ahead)
        centre = geometry.farthest_point_sample(points, max(1, round(centre_ratio * patches.shape[1])))
        return Neighbourhoods(centre, geometry.knn(geometry.gather(points, centre), points, min(k, points.shape[1])))


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
        order, ends = geometry.gathered(samples, len(points))
        points = points.detach()[order]
        centre, centre_ends = geometry.ragged_farthest_point_sample(points, ends, centre_ratio)
        neighbour = geometry.ragged_knn(points[centre], centre_ends, points, ends, k)
        nearest = geometry.ragged_knn(points, ends, points[centre], centre_ends, k)
        weights = geometry.nearest_weights(points, points[centre], nearest)
        place = order.argsort()
        near = Neighbourhoods(order[centre][None], order[neighbour][None])
        return near, Propagation(weights[place][None], nearest[place])
