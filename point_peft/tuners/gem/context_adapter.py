"""The context adapter: a few latent tokens look at all tokens of a scene, and these at the latents."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.errors import AdapterError
from point_peft.running.forward import Forward

# Tokens of packed scenes that attend together.
ROW = 1024


@dataclass(frozen=True)
class SceneRows:
    """Packed tokens of several scenes laid out in rows of one scene each, so that attention is batched."""

    index: Tensor
    """(rows, size) numbers of tokens; what fills a row up repeats its last."""
    real: Tensor
    """(rows, size) whether it is a token, or fills up."""
    scene: Tensor
    """(rows,) the scene of a row."""
    place: Tensor
    """(n,) where each token is in the rows."""
    scenes: int
    """The number of scenes."""


def scene_rows(forward: Forward, stage: int) -> SceneRows | None:
    """The packed tokens of a stage in rows, once per forward; None for dense tokens, which are."""
    if stage not in forward.seen.samples:
        return None
    samples, n = forward.seen.samples[stage], len(forward.seen.coordinates[stage])
    if n == 0:
        raise AdapterError("GEM looks at all tokens of a scene, and this batch holds none: pass one point or more")
    return forward.once(("gem rows", stage), lambda: _scene_rows(samples, n))


def _scene_rows(samples: Tensor, n: int) -> SceneRows:
    order, ends = geometry.gathered(samples, n)
    index, real, scene = geometry.rows_of(ends, n, ROW)
    index = order[index]
    place = torch.empty_like(order)
    place[index[real]] = real.flatten().nonzero()[:, 0]
    return SceneRows(index, real, scene, place, len(ends))


class CrossAttention(nn.Module):
    """softmax(Q a (K b)^T / sqrt(d)) V b of tokens a that look at tokens b, both (b, l, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.query(a), self.key(b), self.value(b))

    def over_rows(self, a: Tensor, b: Tensor, rows: SceneRows) -> Tensor:
        """The same (scenes, m, d) of tokens a (m, d) that look at each scene's tokens, which are rows b."""
        k, v = self.key(b), self.value(b)
        scores = torch.einsum("md,rsd->rms", self.query(a), k).float() * a.shape[-1] ** -0.5
        scores = scores.masked_fill(~rows.real[:, None], -torch.inf)
        # The softmax does not depend on what is subtracted, so neither does its gradient.
        highest = scores.detach().amax(dim=2)
        where = rows.scene[:, None].expand_as(highest)
        limit = highest.new_zeros(rows.scenes, len(a)).scatter_reduce(0, where, highest, "amax", include_self=False)
        share = (scores - limit[rows.scene][:, :, None]).exp()
        # Shares of a large scene are too small for half precision; those of the highest are not.
        summed = torch.einsum("rms,rsd->rmd", share.to(v.dtype), v).float()
        total = share.new_zeros(rows.scenes, len(a)).index_add(0, rows.scene, share.sum(dim=2))
        mixed = summed.new_zeros(rows.scenes, *summed.shape[1:]).index_add(0, rows.scene, summed)
        # The highest has a share of one, so only a scene without tokens has less.
        mean: Tensor = (mixed / total.clamp(min=1.0)[:, :, None]).to(v.dtype)
        return mean


class ContextAdapter(nn.Module):
    """Tokens look at latents that have looked at all tokens of the scene, in `width` channels; zero at first."""

    def __init__(self, channels: int, width: int, latents: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width, bias=False)
        self.norm = nn.LayerNorm(width)
        # Of the size of the tokens: latents that begin alike would look at the same.
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.look = CrossAttention(width)
        self.read = CrossAttention(width)
        self.up = nn.Linear(width, channels, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, rows: SceneRows | None) -> Tensor:
        """The change of tokens (b, g, c), or packed (1, n, c) of the scenes in `rows`."""
        tokens = self.norm(self.down(x))
        if rows is None:
            latents = self.latents + self.look(self.latents.expand(x.shape[0], -1, -1), tokens)
            added: Tensor = self.up(self.read(tokens, latents))
            return added
        tokens = tokens[0][rows.index]
        latents = self.latents + self.look.over_rows(self.latents, tokens, rows)
        read = self.read(tokens, latents[rows.scene])
        added = self.up(read.flatten(0, 1)[rows.place])
        return added[None]
