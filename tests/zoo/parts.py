"""Pieces that several of the backbones written here share. Their names are those of no published model."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.backbones.layers import Group

from .registry import WIDTH

GROUPS = 16
GROUP_SIZE = 8
HEADS = 4


class PatchNet(nn.Module):
    """A token (b, g, c) of each patch (b, g, k, f): the maximum over its points."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.lift = nn.Linear(features, 32)
        self.out = nn.Linear(32, WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        tokens: Tensor = self.out(torch.relu(self.lift(patches))).amax(2)
        return tokens


class Tokenizer(nn.Module):
    """Tokens (b, g, c) of the patches of clouds (b, n, 3), and the patches' centres (b, g, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = Group(GROUPS, GROUP_SIZE)
        self.net = PatchNet()

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        patches, centres = self.sampler(points)
        return self.net(patches), centres


class SelfAttention(nn.Module):
    """Attention over tokens (b, l, c) under a mask as `scaled_dot_product_attention` takes it: True is what counts."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(tokens), "b l (qkv h c) -> qkv b h l c", qkv=3, h=HEADS).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.merge(rearrange(mixed, "b h l c -> b l (h c)"))
        return out


class Layer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(width)
        self.attention = SelfAttention(width)
        self.norm_b = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.attention(self.norm_a(tokens), mask)
        out: Tensor = tokens + self.feed(self.norm_b(tokens))
        return out


class Positions(nn.Sequential):
    """Position features (b, g, c) of coordinates (b, g, 3)."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def first_and_largest(tokens: Tensor, prefix: int = 1) -> Tensor:
    """The first token beside the maximum of those after the prefix (b, 2 c)."""
    return torch.cat([tokens[:, 0], tokens[:, prefix:].amax(1)], dim=1)
