"""The bottleneck adapter of Point-PEFT and GAPrompt, and tokens with what it makes of them added.

A(x) = W_up dropout(f(W_down x + b_down)) + b_up,    f(h) = h sigmoid(1.702 h)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from point_peft.parts.bottleneck import Bottleneck


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
    """x + scale A(x) for tokens x (..., c) and an adapter of `quick_bottleneck`."""
    if not works_by_hand(x, adapter):
        return x.add(adapter(x).to(x.dtype), alpha=scale)
    rows = x.reshape(-1, x.shape[-1])
    adapted: Tensor = _AddAdapted.apply(rows, *tensors_of(adapter), *dropout(adapter, len(rows)), scale)  # type: ignore[no-untyped-call]
    return adapted.view(x.shape)


class _AddAdapted(torch.autograd.Function):
    """The same for rows (n, c), with the gradient by hand: fewer passes, and of the middle only one tensor is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        kept: Tensor | None,
        gain: float,
        scale: float,
    ) -> Tensor:
        middle = Middle(torch.addmm(down_bias, x, down.T), kept, gain)
        ctx.gain, ctx.scale = gain, scale
        ctx.save_for_backward(x, down, up, middle.before, kept)
        return torch.addmm(x, *middle.factors(up, up_bias), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, before, kept = ctx.saved_tensors
        to_before, to_up, to_up_bias = Middle(before, kept, ctx.gain).backward(gradient, up, ctx.scale)
        to_x = torch.addmm(gradient, to_before, down)
        return to_x, to_before.T @ x, to_before.sum(0), to_up, to_up_bias, None, None, None


def works_by_hand(x: Tensor, *modules: nn.Module) -> bool:
    """Whether modules with tensors of this type need not be called: in no mixed precision, and nobody listens to them.

    A compiler fuses for itself.
    """
    within = [inner for module in modules for inner in module.modules()]
    heard = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in within)
    mixed = torch.is_autocast_enabled(x.device.type) or any(p.dtype != x.dtype for m in modules for p in m.parameters())
    return not heard and not mixed and not torch.compiler.is_compiling()


def tensors_of(adapter: Bottleneck) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_down, b_down, W_up, b_up."""
    return adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias


def dropout(adapter: Bottleneck, count: int) -> tuple[Tensor | None, float]:
    """What the dropout keeps of the middle of `count` tokens (count, width), and its gain; None: all."""
    rate = adapter.dropout.p
    if not adapter.dropout.training or rate == 0.0:
        return None, 1.0
    width = len(adapter.down.weight)
    # Four numbers of 16 bits at a time: torch's own draws 64 bits for each, and to draw is what takes its time.
    bits = torch.empty(-(count * width // -4), dtype=torch.int64, device=adapter.down.weight.device)
    drawn = bits.random_(-(2**63), None).view(torch.int16)[: count * width].view(count, width)
    least = min(round(rate * 2**16), 2**16 - 1) - 2**15  # a number beyond 16 bits would wrap around
    return drawn >= least, 1.0 / (1.0 - rate)


class Middle(NamedTuple):
    """The middle of an adapter, for n tokens."""

    before: Tensor
    """(n, width), before the activation."""
    kept: Tensor | None
    """What dropout keeps of it."""
    gain: float
    """What dropout multiplies that by."""

    def factors(self, up: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is A(x)."""
        # The bias as one more channel of the middle: one pass over what is wide and not three.
        return self._active_and_one(1.0), torch.cat([up, up_bias[:, None]], dim=1).T

    def backward(self, gradient: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to `before`, W_up and b_up of that (n, c) to scale A(x)."""
        to_up = self._active_and_one(scale).T @ gradient
        to_active = gradient @ (scale * self.gain * up)
        if self.kept is not None:
            to_active *= self.kept
        return torch.ops.aten.silu_backward(to_active, 1.702 * self.before), to_up[:-1].T, to_up[-1]

    def _active_and_one(self, scale: float) -> Tensor:
        active = nn.functional.silu(1.702 * self.before).mul_(scale * self.gain / 1.702)
        if self.kept is not None:
            active *= self.kept
        return nn.functional.pad(active, (0, 1), value=scale)
