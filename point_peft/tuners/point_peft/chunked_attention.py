"""What `local_attention` does neighbourhood by neighbourhood, some of them at a time, in torch.

A CPU waits for its memory here, and what fits into its cache need not wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

# Numbers in the largest tensor that is worked on at a time: on a CPU as many as the caches of its cores hold, 3 MB.
CHUNK_ELEMENTS = 3 * 2**18
CHUNK_ELEMENTS_OF_OTHERS = 2**25


class Given(NamedTuple):
    """What is pooled: m neighbourhoods of k among n tokens."""

    x: Tensor
    """The tokens (n, c)."""
    qkv: Tensor
    """Query, key and value of all heads (n, 3 w), the query scaled."""
    weight: Tensor
    """What leads back from the heads (c, w)."""
    rows: Tensor
    """Which tokens are neighbours, (m, k)."""
    keep: Tensor | None
    """What a neighbourhood's attention is multiplied by (m,)."""
    heads: int


def pooled(given: Given, with_winner: bool) -> tuple[Tensor, Tensor | None]:
    """The maximum (m, c) over each neighbourhood with its attention added, and which neighbour it was (m, c)."""
    x, qkv, weight, rows, keep, heads = given
    (m, k), c = rows.shape, x.shape[1]
    found = x.new_empty(m, c)
    winner = rows.new_empty(m, c, dtype=torch.uint8 if k < 256 else torch.int64) if with_winner else None
    by_head = _by_head(qkv, heads)
    narrow, wide = _steps(rows, heads, c, 1)
    buffer = _buffer(x, wide * k)
    factors = None if keep is None else repeat(keep, "m -> m k", k=k)
    for first in range(0, m, narrow):
        part = slice(first, first + narrow)
        mixed = _times(_attend(by_head, rows[part]).mixed, factors, part)
        for few, taken in _parts(mixed, first, wide, k):
            near = rows[few].flatten()
            values = torch.index_select(x, 0, near, out=buffer[: len(near)])
            values = values.addmm_(taken.T, weight.T)
            if winner is None:
                torch.amax(values.view(-1, k, c), 1, out=found[few])
            else:
                # As an image of k by 1 pixels, pooled to one: the maximum and where it was, in one pass.
                image = rearrange(values, "(m k) c -> m c k 1", k=k)
                largest, place = torch.ops.aten.max_pool2d_with_indices(image, [k, 1])
                found[few], winner[few] = largest.flatten(1), place.flatten(1)
    return found, winner


def gradients(given: Given, gradient: Tensor, winner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient to x (n, c), qkv (n, 3 w) and weight (c, w) of that to `pooled` (m, c)."""
    x, qkv, weight, rows, keep, heads = given
    (m, k), c = rows.shape, x.shape[1]
    to_x, to_weight, to_qkv = torch.zeros_like(x), x.new_zeros(weight.T.shape), x.new_zeros(qkv.T.shape)
    by_head = _by_head(qkv, heads)
    # The gradient of the attention's weights lies beside them.
    narrow, wide = _steps(rows, heads, c, 2)
    buffer, numbers = _buffer(x, wide * k), _numbers(x, k)
    factors = None if keep is None else repeat(keep, "m -> m k", k=k)
    for first in range(0, m, narrow):
        part = slice(first, first + narrow)
        attention, to_each = _attend(by_head, rows[part]), []
        mixed = _times(attention.mixed, factors, part)
        for few, taken in _parts(mixed, first, wide, k):
            # Of the neighbours, only the one that was the maximum of a channel gets its gradient.
            won = buffer[: rows[few].numel()].view(-1, k, c)
            torch.eq(winner[few, None].to(x.dtype), numbers, out=won).mul_(gradient[few, None])
            won = won.flatten(0, 1)
            to_x.index_add_(0, rows[few].flatten(), won)
            to_weight.addmm_(taken, won)
            to_each.append(weight.T @ won.T)
        to_mixed = _times(torch.cat(to_each, dim=1), factors, part)
        to_qkv.index_add_(1, rows[part].flatten(), attention.backward(to_mixed))
    return to_x, to_qkv.T, to_weight.T


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


def _by_head(qkv: Tensor, heads: int) -> Tensor:
    """Query, key and value (n, 3 h c) of tokens, head by head, (h, n, 3 c)."""
    return rearrange(qkv, "n (qkv h c) -> h n (qkv c)", qkv=3, h=heads).contiguous()


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
