"""Point-MAE computed as it was published, with the same tensors and the same output: what ours is compared with.

The reference backbone of point_peft takes fewer operations and keeps less for the backward pass. What full fine-tuning
and inference cost whoever uses the published form is measured by this one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, reduce
from torch import Tensor

from point_peft.backbones import PointTransformer
from point_peft.backbones.layers import Attention, Encoder


class PublishedEncoder(Encoder):
    """The second layers see the maximum of the group beside each of its points, as one tensor."""

    def forward(self, neighborhood: Tensor) -> Tensor:
        b, _, k, _ = neighborhood.shape
        local = self.first_conv(rearrange(neighborhood, "b g k c -> (b g) c k"))
        whole = reduce(local, "bg c k -> bg c 1", "max")
        points = self.second_conv(torch.cat([whole.expand(-1, -1, k), local], dim=1))
        tokens: Tensor = reduce(points, "(b g) c k -> b g c", "max", b=b)
        return tokens


class PublishedAttention(Attention):
    """Scores, softmax and mixture one after another."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None
        q, k, v = rearrange(self.qkv(tokens), "b l (qkv h c) -> qkv b h l c", qkv=3, h=self.num_heads).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        out: Tensor = self.proj(rearrange(scores.softmax(dim=-1) @ v, "b h l c -> b l (h c)"))
        return out


def as_published(make: Callable[..., PointTransformer], **fields: int) -> PointTransformer:
    """A backbone that computes in the published form."""
    backbone = make(**fields)
    for module in backbone.modules():
        if isinstance(module, Encoder):
            module.__class__ = PublishedEncoder
        elif isinstance(module, Attention):
            module.__class__ = PublishedAttention
    return backbone
