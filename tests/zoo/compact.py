"""A backbone as a user might write it: separate query, key and value layers, an attention mask, grouping that is random
in training, gradient checkpointing."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft.backbones.layers import Encoder, Group

from .inputs import clouds, slice_batch
from .registry import CLASSES, ENCODER_WIDTHS, WIDTH, linear_head, register

Checkpointing = Literal["inside", "block", "container"]
"""Modules that are run again in the backward pass: the inside of each block, each block with its hooks, all blocks."""


class RandomGroup(Group):
    """Grouping that begins at a random point while training."""

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.randperm(points.shape[1]) if self.training else torch.arange(points.shape[1])
        return super().forward(points[:, order])


class CompactAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        mixed: Tensor = self.out((self.q(tokens) @ self.k(tokens).mT * 0.2 + mask).softmax(2) @ self.v(tokens))
        return mixed


class CompactBlock(nn.Module):
    def __init__(self, width: int, again: bool, reentrant: bool) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(width)
        self.attention = CompactAttention(width)
        self.norm_b = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2 * width, width))
        self.again = again
        self.reentrant = reentrant

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.again and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.inside, tokens, mask, use_reentrant=self.reentrant)
            return out
        return self.inside(tokens, mask)

    def inside(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm_a(tokens), mask)
        out: Tensor = tokens + self.mlp(self.norm_b(tokens))
        return out


class CompactEncoder(nn.Module):
    def __init__(self, width: int, depth: int, again: Checkpointing | None, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CompactBlock(width, again == "inside", reentrant) for _ in range(depth))
        self.again = again
        self.reentrant = reentrant

    def forward(self, tokens: Tensor, pos: Tensor, mask: Tensor) -> Tensor:
        again = self.again == "block" and torch.is_grad_enabled()
        for block in self.blocks:
            args = (block, tokens + pos, mask)
            tokens = checkpoint(*args, use_reentrant=self.reentrant) if again else block(*args[1:])
        return tokens


class Compact(nn.Module):
    """A small classifier of clouds (b, n, 3) whose blocks take an attention mask and may be gradient-checkpointed."""

    def __init__(self, *, again: Checkpointing | None = None, reentrant: bool = False, spare: bool = False) -> None:
        super().__init__()
        self.group_divider = RandomGroup(16, 8)
        self.encoder = Encoder(WIDTH, widths=ENCODER_WIDTHS)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Sequential(nn.Linear(3, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = CompactEncoder(WIDTH, 2, again, reentrant)
        self.norm = nn.LayerNorm(WIDTH)
        self.cls_head_finetune = nn.Sequential(nn.Linear(2 * WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.again = again
        self.reentrant = reentrant
        self.layout = "right"
        """A fault in the tokens that the blocks get, for tests that want it so."""
        if spare:
            self.spare = nn.Linear(4, 4)
            self.spares = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, points: Tensor) -> Tensor:
        neighborhood, center = self.group_divider(points)
        tokens = torch.cat([self.cls_token.expand(len(points), -1, -1), self.encoder(neighborhood)], dim=1)
        pos = torch.cat([self.cls_pos.expand(len(points), -1, -1), self.pos_embed(center)], dim=1)
        tokens, pos = self._spoil(tokens), self._spoil(pos)
        count = torch.arange(tokens.shape[1])
        mask = (count[:, None] - count).abs() * -0.02
        if self.again is not None and self.reentrant and torch.is_grad_enabled() and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_()  # this kind of checkpointing needs an input with a gradient
        if self.again == "container" and torch.is_grad_enabled():
            tokens = checkpoint(self.blocks, tokens, pos, mask, use_reentrant=self.reentrant)
        else:
            tokens = self.blocks(tokens, pos, mask)
        tokens = self.norm(tokens)
        logits: Tensor = self.cls_head_finetune(torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], dim=1))
        return logits

    def _spoil(self, tokens: Tensor) -> Tensor:
        if self.layout == "one token more":
            return torch.cat([tokens, tokens[:, :1]], dim=1)
        if self.layout == "sequence first":
            return tokens.transpose(0, 1)
        if self.layout == "flat":
            return tokens.flatten(0, 1)
        return tokens


@register(
    inputs=clouds,
    slice=slice_batch,
    heads=("cls_head_finetune",),
    other_head=linear_head(2 * WIDTH),
    random_in_training=True,
)
def compact() -> nn.Module:
    return Compact()


def compact_like(plain: nn.Module, **options: Any) -> Compact:
    """A `Compact` of other options with the values of a plain one."""
    model = Compact(**options)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model.eval()
