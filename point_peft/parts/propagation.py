"""Propagation of features: neighbourhoods of tokens are pooled, and their centres give to all patches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft import geometry
from point_peft.parts.batch_norm import BatchNorm
from point_peft.running.forward import Forward


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

    def own_tokens(self, tokens: Tensor) -> Tensor:
        """Those of tokens (b, l, c) that are centres, (b, s, c)."""
        rows = rearrange(tokens, "b l c -> (b l) c").index_select(0, self.centre_rows.flatten())
        return rearrange(rows, "(b s) c -> b s c", b=tokens.shape[0])


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
        return geometry.ragged_interpolate(centres[0], self.nearest, self.weights[0])[None]


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
        values = self.values(pooled, near.own_tokens(tokens), recomputing=recomputing)
        return onto + propagate(values).to(onto.dtype)

    def values(self, pooled: Tensor, own: Tensor, *, recomputing: bool) -> Tensor:
        """What the centres propagate (b, s, c), of what is pooled around them and of their own tokens."""
        if isinstance(self.norm, BatchNorm):
            pooled = self.norm.normalise(pooled, recomputing=recomputing)
        else:
            pooled = self.norm(pooled)
        centres = nn.functional.gelu(pooled).add(own, alpha=self.centre_scale)
        # Centres are fewer than tokens, so they are scaled and not what they propagate.
        return (self.scale if self.gate is None else self.scale * self.gate) * centres

    @property
    def learned(self) -> tuple[Tensor, ...]:
        """The tensors in it that are trained."""
        tensors = self.norm.weight, self.norm.bias, self.gate
        return tuple(tensor for tensor in tensors if tensor is not None and tensor.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far the centres among the tokens of a stage reach: what tells how they propagate, when it is asked."""

    forward: Forward
    key: Hashable
    near: Neighbourhoods
    patches: Tensor
    """Coordinates (b, g, 3)."""
    ahead: Tensor | None
    """Coordinates (p, 3) of prompts ahead of the patches."""
    before: int
    """Tokens before these lie nowhere, and nothing is propagated to them."""
    packed: Propagation | None = None

    def __call__(self) -> Propagation:
        """Once per forward; made anew where coordinates are trained, so that checkpointing can make it again."""
        if self.packed is not None:
            return self.packed
        learned = self.patches.requires_grad or (self.ahead is not None and self.ahead.requires_grad)
        return Propagation(self.weights if learned and torch.is_grad_enabled() else self.held())

    @property
    def weights(self) -> Tensor:
        """How much of each centre goes to prefix and patches, (b, before + g, s)."""
        weights = geometry.inverse_distance_weights(self.patches, self._centres)
        return nn.functional.pad(weights, (0, 0, self.before, 0))

    def held(self) -> Tensor:
        """These once per forward, without gradient."""
        with torch.no_grad():
            return self.forward.once(("weights", self.key), lambda: self.weights)

    def to_ahead(self, gradient: Tensor) -> Tensor:
        """The gradient to the coordinates of prompts of that to the weights."""
        assert self.ahead is not None
        given, weights = (x[:, self.before :] for x in (gradient, self.held()))
        to_centres = geometry.gradient_to_sources(given.to(weights.dtype), weights, self.patches, self._centres)
        to_places = to_centres.new_zeros(len(self.ahead) + self.patches.shape[1], 3)
        to_places.index_add_(0, self.near.centre.flatten(), to_centres.flatten(0, 1))
        return to_places[: len(self.ahead)].to(self.ahead.dtype)

    @property
    def _centres(self) -> Tensor:
        """Coordinates (b, s, 3)."""
        return geometry.gather(coordinates_of(self.patches, self.ahead), self.near.centre)


def neighbourhoods(
    forward: Forward,
    stage: int,
    centre_ratio: float,
    k: int,
    ahead: Tensor | None = None,
    owner: Hashable = None,
    before: int = 0,
) -> tuple[Neighbourhoods, Reach]:
    """Neighbourhoods among the tokens of a stage, once per forward, and how far their centres reach.

    `ahead` (p, 3) are the coordinates of prompts ahead of the patches, which are `owner`'s; `before` these there are
    tokens that lie nowhere.
    """
    patches = forward.seen.coordinates[stage]
    # Without prompts nothing depends on the adapter, so all adapters share the result. Blocks that are called without
    # their model share a forward from one training step to the next, in which the coordinates of prompts have moved.
    tracked = ahead is not None and not torch.compiler.is_compiling() and not ahead.is_inference()
    of = None if ahead is None else (owner, ahead._version if tracked else 0)
    key = ("propagation", stage, of, centre_ratio, k, before)
    packed = None
    if stage in forward.seen.samples:
        samples = forward.seen.samples[stage]
        near, packed = forward.once(("packed", key), lambda: _packed(patches, samples, centre_ratio, k))
    else:
        near = forward.once(("neighbourhoods", key), lambda: _chosen(patches, ahead, centre_ratio, k, before))
    reach = Reach(forward=forward, key=key, near=near, patches=patches, ahead=ahead, before=before, packed=packed)
    return near, reach


def _chosen(patches: Tensor, ahead: Tensor | None, centre_ratio: float, k: int, before: int) -> Neighbourhoods:
    with torch.no_grad():
        points = coordinates_of(patches, ahead)
        centre = geometry.farthest_point_sample(points, max(1, round(centre_ratio * patches.shape[1])))
        neighbour = geometry.knn(geometry.gather(points, centre), points, min(k, points.shape[1]))
        return Neighbourhoods.among(before + points.shape[1], centre, neighbour, before)


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
        near = Neighbourhoods.among(len(points), order[centre][None], order[neighbour][None])
        return near, Propagation(weights[place][None], nearest[place])
