"""What pools the neighbourhoods of tokens in Point-PEFT: local attention, one for all blocks of a stage."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import geometry
from point_peft.tuners.base import SharedState

# Features of neighbourhoods that are kept for the backward pass, 64 MB of float32. Of more, as of a scene's, so many at
# a time are made, and made again in the backward pass.
KEPT_ELEMENTS = 2**24
CHUNK_ELEMENTS = 2**22


class StageState(SharedState):
    """What the geometry-aware adapters of one stage share: the local attention and the prompts' coordinates."""

    def __init__(self, prefix: str, channels: int, width: int, heads: int, prompts: int, drop_path: float) -> None:
        super().__init__()
        self.prefix = prefix
        self.local_attention = LocalAttention(channels, width, heads, drop_path)
        self.prompt_coordinates = nn.Parameter(torch.empty(prompts, 3)) if prompts else None
        if self.prompt_coordinates is not None:
            nn.init.trunc_normal_(self.prompt_coordinates, std=0.02)


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
