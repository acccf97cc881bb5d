"""Attention within neighbourhoods and the maximum over each, for all neighbourhoods of a batch at once.

    pooled_j = max_i ( t_i + W sum_i' a_ii' v_i' ),    a_i = softmax_i' (scale q_i . k_i'),    i, i' in N_j
    [q; k; v]_i = Q LN(t_i)

Tokens of all samples lie in one row; a neighbourhood is k numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce, repeat
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
    """The maximum (m, c) over neighbourhoods `rows` (m, k) of tokens (n, c) with their attention added.

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
    neighbours, (m, k) = rows.flatten(), rows.shape
    gathered = nn.functional.linear(normed, to_qkv).index_select(0, neighbours)
    query, key, value = rearrange(gathered, "(m k) (qkv h c) -> qkv m h k c", qkv=3, h=heads, m=m, k=k).unbind(0)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    mixed = mixed if keep is None else mixed * keep[:, None, None, None]
    projected = rearrange(mixed, "m h k c -> (m k) (h c)") @ projection.T
    pooled: Tensor = reduce(tokens.index_select(0, neighbours) + projected, "(m k) c -> m c", "max", m=m, k=k)
    return pooled


class _PooledAttention(torch.autograd.Function):
    """The same, some neighbourhoods at a time, with the gradient by hand; it keeps the tokens and which was largest.

    A CPU waits for its memory here, and what fits into its cache need not wait.
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
        (m, k), c = rows.shape, tokens.shape[1]
        kind = torch.promote_types(tokens.dtype, torch.float32)
        x, weight = tokens.to(kind), projection.to(kind)
        pooled = x.new_empty(m, c)
        winner = rows.new_empty(m, c, dtype=torch.uint8 if k < 256 else torch.int64) if with_gradient else None
        with _in_full(tokens.device.type):
            normed = nn.functional.layer_norm(x, (c,), norm_weight.to(kind), norm_bias.to(kind), eps)
            by_head = _by_head(normed, to_qkv.to(kind), heads, scale)
            narrow, wide = _steps(rows, heads, c, 1)
            buffer = _buffer(x, wide * k)
            factors = None if keep is None else repeat(keep.to(kind), "m -> m k", k=k)
            for first in range(0, m, narrow):
                part = slice(first, first + narrow)
                mixed = _times(_attend(by_head, rows[part]).mixed, factors, part)
                for few, taken in _parts(mixed, first, wide, k):
                    near = rows[few].flatten()
                    values = torch.index_select(x, 0, near, out=buffer[: len(near)])
                    values = values.addmm_(taken.T, weight.T)
                    if winner is None:
                        torch.amax(values.view(-1, k, c), 1, out=pooled[few])
                    else:
                        # As an image of k by 1 pixels, pooled to one: the maximum and where it was, in one pass.
                        image = rearrange(values, "(m k) c -> m c k 1", k=k)
                        largest, place = torch.ops.aten.max_pool2d_with_indices(image, [k, 1])
                        pooled[few], winner[few] = largest.flatten(1), place.flatten(1)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, to_qkv, projection, rows, keep, winner)
        return pooled.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, to_qkv, projection, rows, keep, winner = ctx.saved_tensors
        (m, k), (n, c), heads = rows.shape, tokens.shape, ctx.heads
        kind = torch.promote_types(tokens.dtype, torch.float32)
        x, gain, shift, to_three, weight = (t.to(kind) for t in (tokens, norm_weight, norm_bias, to_qkv, projection))
        gradient = gradient.to(kind)
        with _in_full(tokens.device.type):
            normed, mean, rstd = torch.native_layer_norm(x, (c,), gain, shift, ctx.eps)
            by_head = _by_head(normed, to_three, heads, ctx.scale)
            to_tokens, to_projection = torch.zeros_like(x), x.new_zeros(weight.shape[1], c)
            to_qkv_of_tokens = x.new_zeros(len(to_three), n)
            # The gradient of the attention's weights lies beside them.
            narrow, wide = _steps(rows, heads, c, 2)
            buffer, numbers = _buffer(x, wide * k), _numbers(x, k)
            factors = None if keep is None else repeat(keep.to(kind), "m -> m k", k=k)
            for first in range(0, m, narrow):
                part = slice(first, first + narrow)
                attention, to_each = _attend(by_head, rows[part]), []
                mixed = _times(attention.mixed, factors, part)
                for few, taken in _parts(mixed, first, wide, k):
                    # Of the neighbours, only the one that was the maximum of a channel gets its gradient.
                    won = buffer[: rows[few].numel()].view(-1, k, c)
                    torch.eq(winner[few, None].to(kind), numbers, out=won).mul_(gradient[few, None])
                    won = won.flatten(0, 1)
                    to_tokens.index_add_(0, rows[few].flatten(), won)
                    to_projection.addmm_(taken, won)
                    to_each.append(weight.T @ won.T)
                to_mixed = _times(torch.cat(to_each, dim=1), factors, part)
                to_qkv_of_tokens.index_add_(1, rows[part].flatten(), attention.backward(to_mixed))
            to_qkv_of_tokens[: len(to_three) // 3] *= ctx.scale
            through_norm = torch.ops.aten.native_layer_norm_backward(
                to_qkv_of_tokens.T @ to_three, x, (c,), mean, rstd, gain, shift, [True, True, True]
            )
        to_weights = through_norm[1], through_norm[2], to_qkv_of_tokens @ normed, to_projection.T
        found = to_tokens.add_(through_norm[0]), *to_weights
        kinds = (tensor.dtype for tensor in (tokens, norm_weight, norm_bias, to_qkv, projection))
        return *(tensor.to(own) for tensor, own in zip(found, kinds, strict=True)), *[None] * 6


def _in_full(device: str) -> AbstractContextManager[object]:
    """In here, products are in the type of what is multiplied."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Attention(NamedTuple):
    """Attention within m neighbourhoods of k tokens; the h heads, of c channels each, lie before the neighbourhoods."""

    query: Tensor
    """Scaled, (h m, k, c), as are key and value."""
    key: Tensor
    value: Tensor
    weights: Tensor
    """How much of i' goes to i, (h m, i', i)."""
    mixed: Tensor
    """What goes to each, (h c, m k)."""

    def backward(self, to_mixed: Tensor) -> Tensor:
        """The gradient (3 h c, m k) to query, key and value of that (h c, m k) to what was mixed."""
        _, k, c = self.value.shape
        to_mixed = rearrange(to_mixed, "(h c) (m k) -> (h m) k c", c=c, k=k)
        to_weights = torch.bmm(self.value, to_mixed.mT)
        to_scores = torch._softmax_backward_data(to_weights, self.weights, 1, to_mixed.dtype)
        three = torch.bmm(to_scores.mT, self.key), torch.bmm(to_scores, self.query), torch.bmm(self.weights, to_mixed)
        return torch.cat([_by_channel(one, len(self.mixed) // c) for one in three])


def _attend(by_head: Tensor, near: Tensor) -> _Attention:
    """Attention within neighbourhoods `near` (m, k), of query, key and value (h, n, 3 c) of tokens."""
    heads, (m, k) = len(by_head), near.shape
    query, key, value = by_head.index_select(1, near.flatten()).view(heads * m, k, -1).chunk(3, dim=2)
    weights = torch.bmm(key, query.mT).softmax(dim=1)
    return _Attention(query, key, value, weights, _by_channel(torch.bmm(weights.mT, value), heads))


def _times(mixed: Tensor, factors: Tensor | None, part: slice) -> Tensor:
    """What is mixed (h c, m k) in a part of the neighbourhoods, by their factors, of all neighbourhoods (m, k)."""
    return mixed if factors is None else mixed * factors[part].flatten()


def _by_channel(x: Tensor, heads: int) -> Tensor:
    """(h m, k, c) as (h c, m k), whose rows are long: copied faster than short ones."""
    return rearrange(x, "(h m) k c -> (h c) (m k)", h=heads)


def _by_head(normed: Tensor, to_qkv: Tensor, heads: int, scale: float) -> Tensor:
    """Query, key and value (h, n, 3 c) of normed tokens, head by head, the query scaled."""
    query, others = torch.split(to_qkv, [len(to_qkv) // 3, 2 * len(to_qkv) // 3])
    # The weights are fewer than what they make, so they are scaled and put in the order of heads.
    ordered = rearrange(torch.cat([scale * query, others]), "(qkv h c) d -> (h qkv c) d", qkv=3, h=heads)
    return rearrange(normed @ ordered.T, "n (h three) -> h n three", h=heads).contiguous()


def _steps(rows: Tensor, heads: int, c: int, copies: int) -> tuple[int, int]:
    """How many neighbourhoods (m, k) are worked on at a time: in their attention, and in all channels c of tokens.

    Of the attention's weights there are so many `copies`.
    """
    limit = CHUNK_ELEMENTS if rows.device.type == "cpu" else CHUNK_ELEMENTS_OF_OTHERS
    m, k = rows.shape
    narrow, wide = (max(1, min(m, limit // (k * each))) for each in (copies * heads * k, c))
    return narrow, wide


def _parts(mixed: Tensor, start: int, step: int, k: int) -> Iterator[tuple[slice, Tensor]]:
    """Some of the neighbourhoods from `start` on at a time, with what is mixed in them, of all in (h c, m k)."""
    for some in torch.split(mixed, step * k, dim=1):
        stop = start + some.shape[1] // k
        yield slice(start, stop), some
        start = stop


def _buffer(x: Tensor, rows: int) -> Tensor:
    """Room for so many rows of tokens (n, c), for all neighbourhoods in turn: fresh memory is slow."""
    return x.new_empty(rows, x.shape[1])


def _numbers(x: Tensor, k: int) -> Tensor:
    """0, 1 ... for the neighbours in (m, k, c)."""
    return torch.arange(k, dtype=x.dtype, device=x.device)[:, None]
