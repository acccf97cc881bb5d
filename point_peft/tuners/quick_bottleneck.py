"""The bottleneck adapter of Point-PEFT and GAPrompt."""

from __future__ import annotations

from torch import Tensor, nn

from point_peft.tuners.base import Bottleneck


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
