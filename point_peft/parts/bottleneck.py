"""Bottleneck adapters."""

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


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)"""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(1.702 * x) / 1.702


def quick_bottleneck(channels: int, width: int, dropout: float, *, identity: bool) -> Bottleneck:
    """A_r, as published, or with an up-projection of zero."""
    adapter = Bottleneck(channels, width, dropout, QuickGELU())
    for linear in (adapter.down, adapter.up):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)
    if identity:
        adapter.zero_up()
    return adapter


def add_adapted(x: Tensor, adapter: Bottleneck, scale: float) -> Tensor:
    """x + scale A(x)"""
    return x.add(adapter(x).to(x.dtype), alpha=scale)
