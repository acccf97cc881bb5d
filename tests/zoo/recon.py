"""A model with the names and the layout of ReCon, written from their description."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.backbones.layers import Attention, Encoder, Group, Mlp

from .inputs import clouds, slice_batch
from .parts import HEADS, Positions
from .registry import CLASSES, ENCODER_WIDTHS, WIDTH, linear_head, register

PREFIX = 3


class ContrastAttention(nn.Module):
    """Attention of queries (b, m, c) to tokens (b, l, c); one layer for the queries, one for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q = rearrange(self.q(queries), "b m (h c) -> b h m c", h=HEADS)
        k, v = rearrange(self.kv(tokens), "b l (kv h c) -> kv b h l c", kv=2, h=HEADS).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(rearrange(mixed, "b h m c -> b m (h c)"))
        return out


class ContrastBlock(nn.Module):
    """The first three tokens, whatever they are, look once more at all the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention(WIDTH, HEADS)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp(WIDTH, 4 * WIDTH)
        self.norm3 = nn.LayerNorm(WIDTH)
        self.attn_contrast = ContrastAttention()
        self.norm4 = nn.LayerNorm(WIDTH)
        self.mlp_contrast = Mlp(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        # The residual is what the norm gives.
        first = self.norm3(x[:, :PREFIX])
        first = first + self.attn_contrast(first, x[:, PREFIX:])
        first = self.norm4(first)
        first = first + self.mlp_contrast(first)
        return torch.cat([first, x[:, PREFIX:]], dim=1)


class ContrastEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ContrastBlock() for _ in range(2))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + pos)
        return x


class ReCon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group_divider = Group(16, 8)
        self.encoder = Encoder(WIDTH, widths=ENCODER_WIDTHS)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.img_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.img_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.text_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.text_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = Positions()
        self.blocks = ContrastEncoder()
        self.norm = nn.LayerNorm(WIDTH)
        self.cls_head_finetune = nn.Sequential(nn.Linear(4 * WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, pts: Tensor) -> Tensor:
        neighborhood, center = self.group_divider(pts)
        tokens = torch.cat([self.cls_token, self.img_token, self.text_token], dim=1).expand(len(pts), -1, -1)
        pos = torch.cat([self.cls_pos, self.img_pos, self.text_pos], dim=1).expand(len(pts), -1, -1)
        x = torch.cat([tokens, self.encoder(neighborhood)], dim=1)
        x = self.norm(self.blocks(x, torch.cat([pos, self.pos_embed(center)], dim=1)))
        features = torch.cat([x[:, :PREFIX].flatten(1), x[:, PREFIX:].amax(1)], dim=1)
        logits: Tensor = self.cls_head_finetune(features)
        return logits


@register(inputs=clouds, slice=slice_batch, heads=("cls_head_finetune",), other_head=linear_head(4 * WIDTH))
def recon_contrast() -> nn.Module:
    """`x[:, :3]` inside the block: what is put before the fourth token takes the place of one of the three."""
    return ReCon()
