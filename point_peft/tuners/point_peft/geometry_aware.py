"""What pools the neighbourhoods of tokens in Point-PEFT: local attention, one for all blocks of a stage."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.parts.base import SharedState
from point_peft.parts.propagation import Neighbourhoods
from point_peft.tuners.point_peft.local_attention import pooled_attention


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

    Norm, query, key and value are taken once per token, not once per neighbour.
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

    def forward(self, tokens: Tensor, near: Neighbourhoods) -> Tensor:
        """The maximum (b, s, c) over each neighbourhood among tokens (b, l, c), with its attention added to it."""
        b, rows = tokens.shape[0], rearrange(tokens, "b l c -> (b l) c")
        keep = self._kept(near.rows.shape[0], rows)
        pooled = pooled_attention(
            rows, self.norm, self.qkv.weight, self.proj.weight, near.rows, keep, self.heads, self.scale
        )
        # The projection's bias is the same for all neighbours, so it need not pass through their maximum.
        bias = self.proj.bias.to(pooled.dtype)
        pooled = pooled + bias if keep is None else torch.addcmul(pooled, keep[:, None], bias)
        return rearrange(pooled, "(b s) c -> b s c", b=b)

    def _kept(self, count: int, like: Tensor) -> Tensor | None:
        """Stochastic depth: while training, factors (count,) that drop the branch of whole neighbourhoods."""
        if not self.training or self.drop_path == 0.0:
            return None
        keep = 1.0 - self.drop_path
        return like.new_empty(count).bernoulli_(keep) / keep
