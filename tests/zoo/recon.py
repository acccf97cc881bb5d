"""Models with the names and the layouts of ReCon and ReCon++, written from their description."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.backbones.layers import Attention, Encoder, Group, Mlp

from .inputs import clouds, slice_batch
from .parts import HEADS, Positions
from .pointgpt import PathGroup, SinePositions, causal_mask
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


class LocalBlock(nn.Module):
    """A block on patch tokens; what is True in a mask (l, l) is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention(WIDTH, HEADS)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), None if attn_mask is None else attn_mask[None])
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ContrastBlock(LocalBlock):
    """The first three tokens, whatever they are, look once more at all the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm3 = nn.LayerNorm(WIDTH)
        self.attn_contrast = ContrastAttention()
        self.norm4 = nn.LayerNorm(WIDTH)
        self.mlp_contrast = Mlp(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = super().forward(x, attn_mask)
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


# ---- ReCon++ ---------------------------------------------------------------------------------------------------------


class QueryAttention(ContrastAttention):
    """The same, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)


class GlobalBlock(nn.Module):
    """A block on queries, which look at patch tokens; one norm is for both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = QueryAttention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.norm1(y))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local_blocks = nn.Sequential(LocalBlock(), LocalBlock())
        self.global_blocks = nn.Sequential(GlobalBlock(), GlobalBlock())

    def forward(self, x: Tensor, pos: Tensor, attn_mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        for local, of_queries in zip(self.local_blocks, self.global_blocks, strict=True):
            x = local(x + pos, attn_mask)
            query = of_queries(query, x)
        return x, query


class StartedExtractor(nn.Module):
    """A start token comes first, and the last patch has no place any more."""

    def __init__(self) -> None:
        super().__init__()
        self.sos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.sos_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = TwoBranches()
        self.ln_f1 = nn.LayerNorm(WIDTH)
        self.ln_f2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, pos: Tensor, attn_mask: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.sos.expand(len(x), -1, -1), x[:, :-1]], dim=1)
        pos = torch.cat([self.sos_pos.expand(len(x), -1, -1), pos[:, :-1]], dim=1)
        x, query = self.blocks(x, pos, attn_mask, query)
        return self.ln_f1(x), self.ln_f2(query)


class PatchGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([LocalBlock()])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.increase_dim = nn.Sequential(nn.Conv1d(WIDTH, 3 * 8, 1))

    def forward(self, x: Tensor, pos: Tensor, attn_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + pos, attn_mask)
        points: Tensor = self.increase_dim(self.ln_f(x).mT).mT.unflatten(2, (8, 3))
        return points


class ReConPlus(nn.Module):
    """Logits of clouds (b, n, 3), and the patches (b, g, k, 3) that it generates."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Encoder(WIDTH, widths=ENCODER_WIDTHS)
        self.pos_embed = SinePositions()
        self.group_divider = PathGroup(16, 8)
        self.encoder = StartedExtractor()
        self.decoder = PatchGenerator()
        self.global_query = nn.Parameter(torch.zeros(1, 4, WIDTH))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.cls_head_finetune = nn.Sequential(nn.Linear(4 * WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, pts: Tensor) -> tuple[Tensor, Tensor]:
        patches, center = self.group_divider(pts)
        query = torch.cat([self.global_query, self.cls_token], dim=1).expand(len(pts), -1, -1)
        step = torch.cat([center[:, :1], center[:, 1:] - center[:, :-1]], dim=1)
        mask = causal_mask(center.shape[1])
        encoded, query = self.encoder(self.embed(patches), self.pos_embed(center), mask, query)
        generated = self.decoder(encoded, self.pos_embed(step), mask)
        img, text, cls = query[:, :2].amax(1), query[:, 2:4].amax(1), query[:, 4]
        logits = self.cls_head_finetune(torch.cat([cls, img, text, encoded.amax(1)], dim=1))
        return logits, generated


@register(
    inputs=clouds,
    slice=slice_batch,
    select=lambda output: output[0],
    heads=("cls_head_finetune",),
    other_head=linear_head(4 * WIDTH),
    unused=("decoder",),
    kind="hierarchical",
)
def recon_plus() -> nn.Module:
    """Two stages of blocks in turn, on patches behind a start token and on queries; a causal mask, a generator."""
    return ReConPlus()
