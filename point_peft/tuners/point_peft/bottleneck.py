"""The bottleneck adapter A_r of Point-PEFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


class Bottleneck(nn.Module):
    """A_r(x) = W_up dropout(quick_gelu(W_down x + b_down)) + b_up, from c channels to `width` and back."""

    def __init__(self, channels: int, width: int, dropout: float, *, identity: bool) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
        if identity:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.dropout(quick_gelu(self.down(x))))
        return out
