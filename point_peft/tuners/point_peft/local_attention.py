"""Attention within neighbourhoods and the maximum over each, for all neighbourhoods of a batch at once.

    pooled_j = max_i ( t_i + W sum_i' a_ii' v_i' ),    a_i = softmax_i' (scale q_i . k_i'),    i, i' in N_j
    [q; k; v]_i = Q LN(t_i)

Tokens of all samples lie in one row; a neighbourhood is k numbers of rows.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from point_peft.tuners.point_peft import chunked_attention
from point_peft.tuners.point_peft.chunked_attention import Given


def pooled_attention(
    tokens: Tensor,
    norm: nn.LayerNorm,
    to_qkv: Tensor,
    projection: Tensor,
    rows: Tensor,
    keep: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    """The maximum (m, c) over neighbourhoods `rows` (m, k) of tokens (n, c) with their attention added.

    `to_qkv` (3 w, c) gives query, key and value of all heads, `projection` (c, w) leads back. `keep` (m,) scales the
    attention of a neighbourhood. Nothing of size m k c is kept.
    """
    weights = norm.weight, norm.bias, to_qkv, projection
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # Compilers fuse for themselves.
        return _in_one(tokens, *weights, rows, keep, heads, scale, norm.eps)
    with_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (tokens, *weights))
    pooled: Tensor = _PooledAttention.apply(  # type: ignore[no-untyped-call]
        tokens, *weights, rows, keep, heads, scale, norm.eps, with_gradient
    )
    return pooled


def _in_one(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    to_qkv: Tensor,
    projection: Tensor,
    rows: Tensor,
    keep: Tensor | None,
    heads: int,
    scale: float,
    eps: float,
) -> Tensor:
    """`pooled_attention` in plain words."""
    normed = nn.functional.layer_norm(tokens, tokens.shape[1:], norm_weight, norm_bias, eps)
    neighbours, (m, k) = rows.flatten(), rows.shape
    gathered = nn.functional.linear(normed, to_qkv).index_select(0, neighbours)
    query, key, value = rearrange(gathered, "(m k) (qkv h c) -> qkv m h k c", qkv=3, h=heads, m=m, k=k).unbind(0)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    mixed = mixed if keep is None else mixed * keep[:, None, None, None]
    projected = rearrange(mixed, "m h k c -> (m k) (h c)") @ projection.T
    pooled: Tensor = reduce(tokens.index_select(0, neighbours) + projected, "(m k) c -> m c", "max", m=m, k=k)
    return pooled


class _PooledAttention(torch.autograd.Function):
    """The same, few neighbourhoods at a time, with the gradient by hand; it keeps the tokens and which was largest."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        to_qkv: Tensor,
        projection: Tensor,
        rows: Tensor,
        keep: Tensor | None,
        heads: int,
        scale: float,
        eps: float,
        with_gradient: bool,
    ) -> Tensor:
        c = tokens.shape[1]
        kind = torch.promote_types(tokens.dtype, torch.float32)
        x, gain, shift, to_three, weight = (t.to(kind) for t in (tokens, norm_weight, norm_bias, to_qkv, projection))
        keep = None if keep is None else keep.to(kind)
        with _in_full(tokens.device.type):
            normed = nn.functional.layer_norm(x, (c,), gain, shift, eps)
            qkv = normed @ _query_times(scale, to_three).T
            given = Given(x, qkv, weight, rows, keep, heads)
            pooled, winner = chunked_attention.pooled(given, with_gradient)
        ctx.heads, ctx.scale, ctx.eps = heads, scale, eps
        ctx.save_for_backward(tokens, norm_weight, norm_bias, to_qkv, projection, rows, keep, winner)
        return pooled.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, to_qkv, projection, rows, keep, winner = ctx.saved_tensors
        c = tokens.shape[1]
        kind = torch.promote_types(tokens.dtype, torch.float32)
        x, gain, shift, to_three, weight = (t.to(kind) for t in (tokens, norm_weight, norm_bias, to_qkv, projection))
        to_three = _query_times(ctx.scale, to_three)
        with _in_full(tokens.device.type):
            normed, mean, rstd = torch.native_layer_norm(x, (c,), gain, shift, ctx.eps)
            given = Given(x, normed @ to_three.T, weight, rows, keep, ctx.heads)
            to_tokens, to_three_of_tokens, to_projection = chunked_attention.gradients(given, gradient.to(kind), winner)
            through_norm = torch.ops.aten.native_layer_norm_backward(
                to_three_of_tokens @ to_three, x, (c,), mean, rstd, gain, shift, [True, True, True]
            )
            to_three = _query_times(ctx.scale, to_three_of_tokens.T @ normed)
        found = to_tokens.add_(through_norm[0]), through_norm[1], through_norm[2], to_three, to_projection
        kinds = (tensor.dtype for tensor in (tokens, norm_weight, norm_bias, to_qkv, projection))
        return *(tensor.to(own) for tensor, own in zip(found, kinds, strict=True)), *[None] * 6


def _in_full(device: str) -> AbstractContextManager[object]:
    """In here, products are in the type of what is multiplied."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _query_times(scale: float, three: Tensor) -> Tensor:
    """What is for query, key and value (3 w, c), scaled for the query: of weights, fewer than what they make."""
    query, others = torch.split(three, [len(three) // 3, 2 * len(three) // 3])
    return torch.cat([scale * query, others])
