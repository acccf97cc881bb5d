"""Attention within neighbourhoods and the maximum over each, for all neighbourhoods of a batch at once.

    pooled_j = max_i ( t_i + W sum_i' a_ii' v_i' ),    a_i = softmax_i' (scale q_i . k_i'),    i, i' in N_j
    [q; k; v]_i = Q LN(t_i)

Tokens of all samples lie in one row; a neighbourhood is k numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Numbers in the largest tensor that is worked on at a time: on a CPU as many as the caches of its cores hold, 3 MB.
CHUNK_ELEMENTS = 3 * 2**18
CHUNK_ELEMENTS_OF_OTHERS = 2**25


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
    """The maximum (m, c) over neighbourhoods `rows` (k, m) of tokens (n, c) with their attention added.

    `to_qkv` (3 w, c) gives query, key and value of all heads, `projection` (c, w) leads back. `keep` (m,) scales the
    attention of a neighbourhood. Nothing of size m k c is kept.
    """
    weights = norm.weight, norm.bias, to_qkv, projection
    if torch.compiler.is_compiling():  # compilers fuse for themselves
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
    neighbours = rearrange(rows, "k m -> (m k)")
    gathered = nn.functional.linear(normed, to_qkv).index_select(0, neighbours)
    q, k, v = rearrange(gathered, "(m k) (qkv h c) -> qkv m h k c", qkv=3, h=heads, k=len(rows)).unbind(0)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    mixed = mixed if keep is None else mixed * keep[:, None, None, None]
    projected = rearrange(mixed, "m h k c -> (m k) (h c)") @ projection.T
    pooled: Tensor = reduce(tokens.index_select(0, neighbours) + projected, "(m k) c -> m c", "max", k=len(rows))
    return pooled


class _PooledAttention(torch.autograd.Function):
    """The same, some neighbourhoods at a time, with the gradient by hand; it keeps the tokens and which was largest.

    A CPU waits for its memory here, and what fits into its cache need not wait. Heads are a few channels wide, so
    neighbourhoods lie innermost, and products run along them.
    """

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
        ctx.heads, ctx.scale, ctx.eps = heads, scale, eps
        kind = torch.promote_types(tokens.dtype, torch.float32)
        x, weight = tokens.to(kind), projection.to(kind)
        pooled = x.new_empty(rows.shape[1], x.shape[1])
        winner = (
            torch.empty_like(pooled, dtype=torch.uint8 if len(rows) < 256 else torch.int64) if with_gradient else None
        )
        with torch.autocast(tokens.device.type, enabled=False):
            normed = nn.functional.layer_norm(x, x.shape[1:], norm_weight.to(kind), norm_bias.to(kind), eps)
            by_channel = to_qkv.to(kind) @ normed.T
            buffer = _buffer(x, rows)
            for part, _, _, mixture in _mixtures(by_channel, rows, keep, heads, scale):
                for few, mixed in _few(part, mixture, buffer):
                    value = torch.index_select(x, 0, rows[:, few].flatten(), out=buffer[: mixed.shape[1]])
                    value = value.addmm_(mixed.T, weight.T).view(len(rows), -1, x.shape[1])
                    torch.amax(value, 0, out=pooled[few])
                    if winner is not None:
                        # In floating point, of which a CPU compares eight at a time.
                        torch.eq(value, pooled[few], out=value).mul_(_numbers(value))
                        winner[few] = value.amax(0)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, to_qkv, projection, rows, keep, winner)
        return pooled.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, to_qkv, projection, rows, keep, winner = ctx.saved_tensors
        kind, c = torch.promote_types(tokens.dtype, torch.float32), tokens.shape[1]
        x, gain, shift, to_three, weight = (t.to(kind) for t in (tokens, norm_weight, norm_bias, to_qkv, projection))
        gradient = gradient.to(kind)
        with torch.autocast(tokens.device.type, enabled=False):
            normed, mean, rstd = torch.native_layer_norm(x, (c,), gain, shift, ctx.eps)
            by_channel = to_three @ normed.T
            to_tokens, to_projection = torch.zeros_like(x), torch.zeros_like(weight.T)
            to_by_channel, buffer = torch.zeros_like(by_channel), _buffer(x, rows)
            for part, gathered, attention, mixture in _mixtures(by_channel, rows, keep, ctx.heads, ctx.scale):
                to_each = []
                for few, mixed in _few(part, mixture, buffer):
                    # Of the neighbours, only the one that was the maximum of a channel gets its gradient.
                    won = buffer[: mixed.shape[1]].view(len(rows), -1, c)
                    torch.eq(winner[few].to(kind), _numbers(won), out=won).mul_(gradient[few])
                    won = won.view(-1, c)
                    to_tokens.index_add_(0, rows[:, few].flatten(), won)
                    to_projection.addmm_(mixed, won)
                    to_each.append(rearrange(won @ weight, "(k m) (h c) -> c h k m", h=ctx.heads, k=len(rows)))
                to_mixture = torch.cat(to_each, dim=3)
                if keep is not None:
                    to_mixture *= keep[part].to(kind)
                q, k, v = _split(gathered, ctx.heads, len(rows))
                to_scores = torch._softmax_backward_data(_outer(to_mixture, v), attention, 2, kind)
                to_gathered = torch.empty_like(gathered)
                to_q, to_k, to_v = _split(to_gathered, ctx.heads, len(rows))
                _over_keys(to_scores, k * ctx.scale, to_q)
                _over_queries(to_scores, q * ctx.scale, to_k)
                _over_queries(attention, to_mixture, to_v)
                to_by_channel.index_add_(1, rows[:, part].flatten(), to_gathered)
            to_normed = to_by_channel.T @ to_three
            through_norm = torch.ops.aten.native_layer_norm_backward(
                to_normed, x, (c,), mean, rstd, gain, shift, [True, True, True]
            )
        found = to_tokens + through_norm[0], through_norm[1], through_norm[2], to_by_channel @ normed, to_projection.T
        kinds = (tensor.dtype for tensor in (tokens, norm_weight, norm_bias, to_qkv, projection))
        return *(tensor.to(own) for tensor, own in zip(found, kinds, strict=True)), *[None] * 6


def _mixtures(
    by_channel: Tensor, rows: Tensor, keep: Tensor | None, heads: int, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Some neighbourhoods at a time: which, what is gathered (3 w, k m), attention (h, i, i', m), mixed (w, k, m)."""
    k, m = rows.shape
    step = _step(rows, 2 * heads * k * k)  # the gradient of the attention lies beside it
    for start in range(0, m, step):
        part = slice(start, start + step)
        gathered = by_channel.index_select(1, rows[:, part].flatten())
        q, key, v = _split(gathered, heads, k)
        attention = _outer(q * scale, key).softmax(dim=2)
        mixed = attention.new_empty(len(gathered) // 3, k, attention.shape[3])
        _over_keys(attention, v, rearrange(mixed, "(h c) k m -> c h k m", h=heads))
        if keep is not None:
            mixed.mul_(keep[part])
        yield part, gathered, attention, mixed


def _few(part: slice, mixed: Tensor, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Of those neighbourhoods, which are in `part`, as many as a buffer holds: which, and their mixed (w, k m)."""
    _, k, m = mixed.shape
    step = len(buffer) // k
    for start in range(0, m, step):
        few = mixed[:, :, start : start + step]
        yield slice(part.start + start, part.start + start + few.shape[2]), rearrange(few, "w k m -> w (k m)")


def _buffer(x: Tensor, rows: Tensor) -> Tensor:
    """Room (k m, c) for what neighbourhoods take of tokens (n, c), for all of them in turn: fresh memory is slow."""
    k, c = len(rows), x.shape[1]
    return x.new_empty(k * _step(rows, k * c), c)


def _step(rows: Tensor, elements: int) -> int:
    """How many neighbourhoods are worked on at a time, if each has so many elements."""
    limit = CHUNK_ELEMENTS if rows.device.type == "cpu" else CHUNK_ELEMENTS_OF_OTHERS
    return max(1, min(rows.shape[1], limit // elements))


def _split(gathered: Tensor, heads: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (c, h, k, m) as views of what was gathered, (3 w, k m)."""
    q, key, v = rearrange(gathered, "(qkv h c) (k m) -> qkv c h k m", qkv=3, h=heads, k=k).unbind(0)
    return q, key, v


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """sum_c a_i b_i' of a and b (c, h, k, m), as (h, i, i', m)."""
    product = a[0][:, :, None] * b[0][:, None]
    for of_a, of_b in zip(a[1:], b[1:], strict=True):
        product.addcmul_(of_a[:, :, None], of_b[:, None])
    return product


def _over_keys(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """sum_i' w_ii' v_i' of weights (h, i, i', m) and values (c, h, i', m), into (c, h, i, m)."""
    (weight, *weights_left), (value, *values_left) = weights.unbind(2), values.unsqueeze(2).unbind(3)
    torch.mul(weight, value, out=out)
    for weight, value in zip(weights_left, values_left, strict=True):
        out.addcmul_(weight, value)


def _over_queries(weights: Tensor, values: Tensor, out: Tensor) -> None:
    """sum_i w_ii' v_i of weights (h, i, i', m) and values (c, h, i, m), into (c, h, i', m)."""
    _over_keys(weights.transpose(1, 2), values, out)


def _numbers(values: Tensor) -> Tensor:
    """0, 1 ... for the neighbours of values (k, m, c)."""
    return torch.arange(len(values), dtype=values.dtype, device=values.device)[:, None, None]
