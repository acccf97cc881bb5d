"""Bottleneck adapters."""

from __future__ import annotations

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A(x) = W_up dropout(activation(W_down x + b_down)) + b_up, from c channels to `width` and back."""

    def __init__(self, channels: int, width: int, dropout: float, activation: nn.Module) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width)
        self.up = nn.Linear(width, channels)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.dropout(self.activation(self.down(x))))
        return out

    def zero_up(self) -> None:
        """Let the up-projection give zero, whatever it gets."""
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
