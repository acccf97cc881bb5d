"""The geometry-aware adapter: neighbourhoods of tokens, local attention, pooling and propagation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import geometry, ragged
from point_peft.context import Forward
from point_peft.tuners.base import SharedState

# Features of neighbourhoods that are kept for the backward pass, 64 MB of float32. Of more, as of a scene's, so many at
# a time are made, and made again in the backward pass.
KEPT_ELEMENTS = 2**24
CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Neighbourhoods:
    """Centres among tokens and the tokens nearest to each: indices (b, s) and (b, s, k).

    In packed tokens b is one: all samples are in one row, and no neighbourhood reaches beyond its sample.
    """

    centre: Tensor
    neighbour: Tensor


@dataclass(frozen=True)
class Propagation:
    """How much each of the centres gives to each of the patches: from all of them, or packed, from the k nearest."""

    weights: Tensor
    """(b, g, s), or packed (1, g, k)."""
    nearest: Tensor | None = None
    """Packed: the centres (g, k) that the weights are of."""

    def __call__(self, centres: Tensor) -> Tensor:
        """What features of the centres (b, s, c) propagate to the patches, (b, g, c)."""
        if self.nearest is None:
            return geometry.interpolate(centres, self.weights)
        return ragged.ragged_interpolate(centres[0], self.nearest, self.weights[0])[None]


class StageState(SharedState):
    """What the geometry-aware adapters of one stage share: the local attention and the prompts' coordinates."""

    def __init__(self, prefix: str, channels: int, width: int, heads: int, prompts: int, drop_path: float) -> None:
        super().__init__()
        self.prefix = prefix
        self.local_attention = LocalAttention(channels, width, heads, drop_path)
        self.prompt_coordinates = nn.Parameter(torch.empty(prompts, 3)) if prompts else None
        if self.prompt_coordinates is not None:
            nn.init.trunc_normal_(self.prompt_coordinates, std=0.02)

    def coordinates(self, patches: Tensor, *, with_prompts: bool) -> Tensor:
        """Coordinates of the tokens: [Q; c] (b, p + g, 3) with prompts, else those of the patches (b, g, 3)."""
        if not with_prompts or self.prompt_coordinates is None:
            return patches
        return torch.cat([self.prompt_coordinates.to(patches.dtype).expand(len(patches), -1, -1), patches], dim=1)


class LocalAttention(nn.Module):
    """Attention among the k tokens of each neighbourhood, with a narrow inner width; pre-norm, residual.

    Norm, query, key and value are taken once per token and then gathered, not once per neighbour.
    """

    def __init__(self, channels: int, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = width**-0.5  # as published: of the inner width, not of a head's
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * width, bias=False)
        self.proj = nn.Linear(width, channels)
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Tensor, neighbour: Tensor) -> Tensor:
        """The maximum (b, s, c) over neighbourhoods (b, s, k) of tokens (b, l, c), each with its attention added."""
        normed = self.qkv(self.norm(tokens))
        keep = self._kept(neighbour, tokens)
        features = tokens.shape[2] * neighbour[:, 0].numel()
        if neighbour.shape[1] * features <= KEPT_ELEMENTS:
            return self._pooled(tokens, normed, neighbour, keep)
        step = max(1, CHUNK_ELEMENTS // features)
        parts = torch.split(neighbour, step, 1)
        factors = [None] * len(parts) if keep is None else torch.split(keep, step, 1)
        pooled = [
            checkpoint(self._pooled, tokens, normed, part, factor, use_reentrant=False, preserve_rng_state=False)
            for part, factor in zip(parts, factors, strict=True)
        ]
        return torch.cat(pooled, dim=1)

    def _pooled(self, tokens: Tensor, qkv: Tensor, neighbour: Tensor, keep: Tensor | None) -> Tensor:
        gathered = geometry.gather(qkv, neighbour)
        q, k, v = rearrange(gathered, "b s k (qkv h c) -> qkv (b s) h k c", qkv=3, h=self.heads).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        mixed = self.proj(rearrange(mixed, "(b s) h k c -> b s k (h c)", b=len(tokens)))
        mixed = mixed if keep is None else mixed * keep
        pooled: Tensor = reduce(geometry.gather(tokens, neighbour) + mixed, "b s k c -> b s c", "max")
        return pooled

    def _kept(self, neighbour: Tensor, like: Tensor) -> Tensor | None:
        """Stochastic depth: while training, factors (b, s, 1, 1) that drop the branch of whole neighbourhoods."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        return like.new_empty(*neighbour.shape[:2], 1, 1).bernoulli_(keep) / keep


class PoolingNorm(nn.BatchNorm1d):
    """BatchNorm over pooled features (b, s, c); its running statistics belong to the adapter."""

    def normalise(self, pooled: Tensor, *, recomputing: bool) -> Tensor:
        """Normalised features; when checkpointing repeats a forward, the statistics are not updated again."""
        x = rearrange(pooled, "b s c -> b c s")
        if self.training and recomputing:
            # On copies: a recomputation must save for backward just what the forward saved.
            mean, var = (None if stat is None else stat.clone() for stat in (self.running_mean, self.running_var))
            momentum = 0.0 if self.momentum is None else self.momentum
            x = nn.functional.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)
        else:
            x = self(x)
        return rearrange(x, "b c s -> b s c")


class GeometryAwareAdapter(nn.Module):
    """t_i <- t_i + scale * sum_j w_ij (GELU(norm(max N_j)) + centre_scale * U_j), for the patch tokens of one block."""

    def __init__(self, channels: int, *, batch_norm: bool, scale: float, centre_scale: float, gated: bool) -> None:
        super().__init__()
        self.scale = scale
        self.centre_scale = centre_scale
        self.norm: PoolingNorm | nn.LayerNorm = PoolingNorm(channels) if batch_norm else nn.LayerNorm(channels)
        self.gate = nn.Parameter(torch.zeros(())) if gated else None

    def forward(
        self,
        patches: Tensor,
        tokens: Tensor,
        near: Neighbourhoods,
        propagate: Propagation,
        attention: LocalAttention,
        *,
        recomputing: bool,
    ) -> Tensor:
        """Patches (b, g, c) with what tokens (b, l, c) around the centres propagate to them."""
        pooled = attention(tokens, near.neighbour)
        if isinstance(self.norm, PoolingNorm):
            pooled = self.norm.normalise(pooled, recomputing=recomputing)
        else:
            pooled = self.norm(pooled)
        centres = nn.functional.gelu(pooled) + self.centre_scale * geometry.gather(tokens, near.centre)
        propagated = self.scale * propagate(centres)
        return patches + (propagated if self.gate is None else self.gate * propagated).to(patches.dtype)


def neighbourhoods(
    forward: Forward, stage: int, state: StageState, owner: str, centre_ratio: float, k: int, *, with_prompts: bool
) -> tuple[Neighbourhoods, Propagation]:
    """Neighbourhoods among the tokens of a stage, and how their centres propagate to the patches.

    Once per forward; weights that carry a gradient to the prompts' coordinates are made anew at every block, because a
    checkpointed block must be able to make them again.
    """
    patches = forward.coordinates[stage]
    # Without prompts nothing depends on the adapter, so all adapters share the result.
    key = ("point_peft", stage, owner if with_prompts else "", centre_ratio, k)
    if stage in forward.samples:
        return forward.once(("packed", *key), lambda: _packed(patches, forward.samples[stage], centre_ratio, k))

    def choose() -> Neighbourhoods:
        with torch.no_grad():
            points = state.coordinates(patches, with_prompts=with_prompts)
            centre = geometry.farthest_point_sample(points, max(1, round(centre_ratio * patches.shape[1])))
            neighbour = geometry.knn(geometry.gather(points, centre), points, min(k, points.shape[1]))
            return Neighbourhoods(centre, neighbour)

    def weigh() -> Propagation:
        points = state.coordinates(patches, with_prompts=with_prompts)
        return Propagation(geometry.inverse_distance_weights(patches, geometry.gather(points, near.centre)))

    near = forward.once(("neighbourhoods", *key), choose)
    learned = state.prompt_coordinates
    if with_prompts and learned is not None and learned.requires_grad and torch.is_grad_enabled():
        return near, weigh()
    return near, forward.once(("weights", *key), weigh)


def _packed(points: Tensor, samples: Tensor, centre_ratio: float, k: int) -> tuple[Neighbourhoods, Propagation]:
    """The same for packed tokens at points (n, 3).

    A scene has too many centres for all of them to reach every token, so the k nearest do.
    """
    with torch.no_grad():
        # Voxels may come in any order; the functions on packed points want each sample in one piece.
        order = torch.arange(len(points), device=points.device)
        if len(samples) == len(points):
            samples, order = samples.sort(stable=True)
        points = points.detach()[order]
        ends = ragged.as_offset(samples, len(points))
        centre, centre_ends = ragged.ragged_farthest_point_sample(points, ends, centre_ratio)
        neighbour = ragged.ragged_knn(points[centre], centre_ends, points, ends, k)
        nearest = ragged.ragged_knn(points, ends, points[centre], centre_ends, k)
        weights = ragged.nearest_weights(points, points[centre], nearest)
        place = order.argsort()
        near = Neighbourhoods(order[centre][None], order[neighbour][None])
        return near, Propagation(weights[place][None], nearest[place])
