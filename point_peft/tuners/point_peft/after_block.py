"""The geometry-aware adapter and A after it on the tokens that a block returns, with the gradient by hand.

t_i <- t_i + sum_j w_ij v_j     v_j: what centre j makes of what is pooled around it, w: `Reach.weights`
t <- t + A(t)                   the prompts are taken out ahead of both
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.propagation import GeometryAwareAdapter, Reach
from point_peft.parts.quick_bottleneck import Middle, dropout, tensors_of
from point_peft.running.tokens import insert, remove


class Prompts(NamedTuple):
    """Where they are among the tokens of a block."""

    at: int
    length: int

    def taken_from(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l, c) without the prompts."""
        return remove(tokens, self.length, self.at, "bgc") if self.length else tokens

    def zero_in(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l - p, c) with zeros in the place of the prompts, (b, l, c)."""
        if self.length == 0:
            return tokens
        b, _, c = tokens.shape
        return insert(tokens, tokens.new_zeros(b, self.length, c), self.at, "bgc")


def propagate_and_adapt(
    tokens: Tensor, pooled: Tensor, prompts: Prompts, geometry: GeometryAwareAdapter, reach: Reach, adapter: Bottleneck
) -> Tensor:
    """Tokens (b, l - p, c) of those that a block returns (b, l, c) and of what is pooled of them (b, s, c).

    Beside these nothing of their size is kept for the backward pass; it makes what the centres propagate once more.
    """
    learned = geometry.learned
    kept, gain = dropout(adapter, tokens.shape[0] * (tokens.shape[1] - prompts.length))
    adapted: Tensor = _PropagateAndAdapt.apply(  # type: ignore[no-untyped-call]
        tokens, pooled, reach.ahead, *tensors_of(adapter), kept, _Rest(prompts, geometry, reach, gain), *learned
    )
    return adapted


class _Rest(NamedTuple):
    """What has no gradient."""

    prompts: Prompts
    geometry: GeometryAwareAdapter
    reach: Reach
    gain: float
    """Of the dropout."""

    def values(self, pooled: Tensor, own: Tensor) -> Tensor:
        return self.geometry.values(pooled, own, recomputing=self.reach.forward.recomputing)


class _PropagateAndAdapt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        pooled: Tensor,
        ahead: Tensor | None,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        kept: Tensor | None,
        rest: _Rest,
        *learned: Tensor,
    ) -> Tensor:
        # Without their graph: who follows the calls of modules would look for a gradient that is made elsewhere.
        values = rest.values(pooled.detach(), rest.reach.near.own_tokens(tokens).detach())
        weights = rest.reach.held().to(tokens.dtype)
        onto = torch.baddbmm(rest.prompts.taken_from(tokens), weights, values)
        rows = rearrange(onto, "b l c -> (b l) c")
        middle = Middle(torch.addmm(down_bias, rows, down.T), kept, rest.gain)
        rows.addmm_(*middle.factors(up, up_bias))
        ctx.rest = rest
        ctx.save_for_backward(tokens, pooled, ahead, weights, down, up, middle.before, kept, *learned)
        return onto

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, pooled, ahead, weights, down, up, before, kept, *learned = ctx.saved_tensors
        (prompts, _, reach, gain), b = ctx.rest, len(tokens)
        to_adapted = rearrange(gradient, "b l c -> (b l) c")
        to_before, to_up, to_up_bias = Middle(before, kept, gain).backward(to_adapted, up, 1.0)
        to_onto = torch.addmm(to_adapted, to_before, down).view(gradient.shape)
        with torch.enable_grad():
            made_of = [x.detach().requires_grad_() for x in (pooled, reach.near.own_tokens(tokens))]
            values = ctx.rest.values(*made_of)
        to_values = torch.bmm(weights.mT, to_onto)
        to_pooled, to_own, *to_learned = torch.autograd.grad(values, [*made_of, *learned], to_values)
        values = values.detach()
        # W_down saw tokens + weights values. Multiplied by the narrow gradient from the left, that sum is never wide.
        narrow = rearrange(to_before, "(b l) r -> b l r", b=b)
        to_down = torch.einsum("blr,blc->rc", prompts.zero_in(narrow), tokens)
        to_down += torch.einsum("brs,bsc->rc", torch.bmm(narrow.mT, weights), values)
        learns_places = ahead is not None and ahead.requires_grad
        to_ahead = reach.to_ahead(torch.bmm(to_onto, values.mT)) if learns_places else None
        to_tokens = prompts.zero_in(to_onto)
        to_tokens.flatten(0, 1).index_add_(0, reach.near.centre_rows.flatten(), to_own.flatten(0, 1))
        to_adapter = to_down, to_before.sum(0), to_up, to_up_bias
        return to_tokens, to_pooled, to_ahead, *to_adapter, None, None, *to_learned
