"""What `local_attention` does neighbourhood by neighbourhood, compiled by numba for a CPU (extra `fast`).

    pooled_j = max_i ( t_i + f_j W sum_i' a_ii' v_i' ),    a_ii' = softmax_i' (q_i . k_i'),    i, i' in N_j

torch has no product for matrices of 16 x 3 that is not mostly overhead. Here a neighbourhood stays in the caches of its
core, and only the neighbour that was the maximum of a channel is visited for its gradient.

The numbers of neighbours, heads and channels of a head come as tuples of that length: numba compiles for each length,
and a loop whose length is known becomes a few vector instructions. Inner loops go along neighbours, which come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from point_peft.tuners.point_peft.chunked_attention import Given
from point_peft.tuners.point_peft.openmp import share_out

Kernel = Callable[..., Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Ints32 = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Length = tuple[int, ...]

FEWEST_IN_PART = 16
"""Neighbourhoods: a tenth of a millisecond's work."""


def pooled(given: Given, with_winner: bool) -> tuple[Tensor, Tensor | None]:
    """As `chunked_attention.pooled`, of up to 255 neighbours."""
    x, qkv, weight, rows, keep, heads = given
    found = x.new_empty(len(rows), x.shape[1])
    winner = rows.new_empty(found.shape, dtype=torch.uint8)
    tokens, three, to, near, factors = _arrays(x, qkv, weight.T, rows, _factors(x, rows, keep))
    (largest, who), lengths = _arrays(found, winner), _lengths(qkv, rows, heads)
    parts = _parts(rows)

    def work(part: int) -> None:
        some = _part(len(rows), part, parts)
        _pool(tokens, three, to, near[some], factors[some], *lengths, largest[some], who[some])

    share_out(work, parts)
    return found, winner if with_winner else None


def gradients(given: Given, gradient: Tensor, winner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked_attention.gradients`."""
    x, qkv, weight, rows, keep, heads = given
    to_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    # What several neighbourhoods add to is there once for each part.
    parts = _parts(rows)
    to_qkv, to_weight = (x.new_zeros(parts, *like.shape) for like in (qkv, weight))
    to_pooled, three, to, near, factors, who = _arrays(gradient, qkv, weight, rows, _factors(x, rows, keep), winner)
    (to_tokens, to_three, to_to), lengths = _arrays(to_x, to_qkv, to_weight), _lengths(qkv, rows, heads)

    def work(part: int) -> None:
        channels, some = _part(x.shape[1], part, parts), _part(len(rows), part, parts)
        _to_winners(to_pooled, near, who, to_tokens, channels.start, channels.stop)
        _to_attention(
            to_pooled[some], three, to, near[some], factors[some], who[some], *lengths, to_three[part], to_to[part]
        )

    share_out(work, parts)
    return to_x, to_qkv.sum(0), to_weight.sum(0)


def _parts(rows: Tensor) -> int:
    """One for each of torch's threads, but for those that would take longer to start than to work."""
    return max(1, min(torch.get_num_threads(), len(rows) // FEWEST_IN_PART))


def _part(length: int, part: int, parts: int) -> slice:
    return slice(length * part // parts, length * (part + 1) // parts)


def _arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _factors(x: Tensor, rows: Tensor, keep: Tensor | None) -> Tensor:
    return x.new_ones(len(rows)) if keep is None else keep


def _lengths(qkv: Tensor, rows: Tensor, heads: int) -> tuple[Length, Length, Length]:
    return (0,) * rows.shape[1], (0,) * heads, (0,) * (qkv.shape[1] // (3 * heads))


def _compiled(*, any_order: bool = True) -> Callable[[Kernel], Kernel]:
    """Compiled at the first call, and kept on disk if the package's folder or the user's cache can be written to.

    `any_order`: of the terms of sums, as vectors need it.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"contract", "reassoc", "nsz", "arcp"} if any_order else {"contract"},
    }

    def compiled(function: Kernel) -> Kernel:
        found: Kernel
        try:
            found = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba's, where there is no such place
            found = numba.njit(**options)(function)
        return found

    return compiled


LOG2_E = np.float32(1 / math.log(2))
# ln 2 in two parts: the first times a small whole number is exact.
LN_2, LN_2_REST = np.float32(355 / 512), np.float32(math.log(2) - 355 / 512)
SMALLEST = np.float32(-87.0)
"""Its exponential is as small as normal numbers are."""
ZERO, HALF, ONE = np.float32(0), np.float32(1 / 2), np.float32(1)
OF_3, OF_4, OF_5, OF_6, OF_7 = (np.float32(1 / math.factorial(n)) for n in range(3, 8))
EXPONENT_BIAS, MANTISSA_BITS = np.int32(127), np.int32(23)


@_compiled(any_order=False)
def _exponential(x: Floats, bits: Ints32, powers: Floats) -> None:
    """exp(x) of x <= 0 (count,), in place, to one unit in the last place; `powers` are `bits`, read as numbers.

    e^x = 2^n e^r with |r| <= ln(2) / 2, by the series of e^r; 2^n is put together from its bits.
    """
    for a in range(x.size):
        value = SMALLEST if x[a] < SMALLEST else x[a]
        n = np.int32(value * LOG2_E - HALF)
        bits[a] = (n + EXPONENT_BIAS) << MANTISSA_BITS
        r = value - np.float32(n) * LN_2 - np.float32(n) * LN_2_REST
        higher = OF_3 + r * (OF_4 + r * (OF_5 + r * (OF_6 + r * OF_7)))
        x[a] = ONE + r * (ONE + r * (HALF + r * higher))
    for a in range(x.size):
        x[a] *= powers[a]


@_compiled()
def _room(k: Length, heads: Length, width: Length) -> tuple[Floats, Floats, Ints32, Floats, Floats]:
    """For what `_attend` writes to."""
    w = len(heads) * len(width)
    own, weights = np.empty((3 * w, len(k)), np.float32), np.empty((len(heads), len(k), len(k)), np.float32)
    bits, mixed = np.empty(weights.size, np.int32), np.empty((w, len(k)), np.float32)
    return own, weights, bits, bits.view(np.float32), mixed


@_compiled()
def _attend(
    qkv: Floats,
    near: Ints,
    factor: np.float32,
    k: Length,
    heads: Length,
    width: Length,
    own: Floats,
    weights: Floats,
    bits: Ints32,
    powers: Floats,
    mixed: Floats,
) -> None:
    """Attention in one neighbourhood: `own` q, k, v (3 w, k), `weights` a_ii' (h, i', i) and what is `mixed` (w, k)."""
    w, largest = len(heads) * len(width), np.empty(len(k), np.float32)
    for i in range(len(k)):
        for c in range(3 * w):
            own[c, i] = qkv[near[i], c]
    for h in range(len(heads)):
        for o in range(len(k)):
            for i in range(len(k)):
                score = ZERO
                for c in range(len(width)):
                    score += own[w + h * len(width) + c, o] * own[h * len(width) + c, i]
                weights[h, o, i] = score
        for i in range(len(k)):
            top = weights[h, 0, i]
            for o in range(1, len(k)):
                top = max(top, weights[h, o, i])
            largest[i] = top
        for o in range(len(k)):
            for i in range(len(k)):
                weights[h, o, i] -= largest[i]
    _exponential(weights.reshape(weights.size), bits, powers)
    for h in range(len(heads)):
        for i in range(len(k)):
            total = ZERO
            for o in range(len(k)):
                total += weights[h, o, i]
            largest[i] = ONE / total
        for o in range(len(k)):
            for i in range(len(k)):
                weights[h, o, i] *= largest[i]
        for c in range(len(width)):
            for i in range(len(k)):
                value = ZERO
                for o in range(len(k)):
                    value += own[2 * w + h * len(width) + c, o] * weights[h, o, i]
                mixed[h * len(width) + c, i] = factor * value


@_compiled()
def _pool(
    x: Floats,
    qkv: Floats,
    weight: Floats,
    rows: Ints,
    factors: Floats,
    k: Length,
    heads: Length,
    width: Length,
    pooled: Floats,
    winner: Bytes,
) -> None:
    """`weight` here is W transposed (w, c)."""
    w = len(heads) * len(width)
    own, weights, bits, powers, mixed = _room(k, heads, width)
    for j in range(len(rows)):
        _attend(qkv, rows[j], factors[j], k, heads, width, own, weights, bits, powers, mixed)
        best, who = pooled[j], winner[j]
        best[:], who[:] = np.float32(-np.inf), np.uint8(0)
        # Two neighbours for each weight that is read; the last of an odd number meets itself, which changes nothing.
        for i in range(0, len(k), 2):
            other = min(i + 1, len(k) - 1)
            one, two = x[rows[j, i]], x[rows[j, other]]
            for channel in range(x.shape[1]):
                first, second = one[channel], two[channel]
                for c in range(w):
                    first += mixed[c, i] * weight[c, channel]
                    second += mixed[c, other] * weight[c, channel]
                # NaN is larger than any number, as it is for torch.
                wins = (first > best[channel]) | (first != first)
                largest, place = first if wins else best[channel], np.uint8(i) if wins else who[channel]
                wins = (second > largest) | (second != second)
                best[channel], who[channel] = second if wins else largest, np.uint8(other) if wins else place


@_compiled()
def _to_winners(gradient: Floats, rows: Ints, winner: Bytes, to_x: Floats, first: int, last: int) -> None:
    """Through the maximum itself, in channels from the first up to the last."""
    for j in range(len(rows)):
        for channel in range(first, last):
            to_x[rows[j, winner[j, channel]], channel] += gradient[j, channel]


@_compiled()
def _to_attention(
    gradient: Floats,
    qkv: Floats,
    weight: Floats,
    rows: Ints,
    factors: Floats,
    winner: Bytes,
    k: Length,
    heads: Length,
    width: Length,
    to_qkv: Floats,
    to_weight: Floats,
) -> None:
    """Through what attention adds."""
    w = len(heads) * len(width)
    own, weights, bits, powers, mixed = _room(k, heads, width)
    # By neighbour, since channels have their own neighbour that won.
    mixed_of, to_mixed_of = np.empty((len(k), w), np.float32), np.empty((len(k), w), np.float32)
    to_mixed, to_own = np.empty_like(mixed), np.empty_like(own)
    to_scores, drift = np.empty((len(k), len(k)), np.float32), np.empty(len(k), np.float32)
    scores_by, weights_by = np.empty_like(to_scores), np.empty_like(to_scores)
    for j in range(len(rows)):
        _attend(qkv, rows[j], factors[j], k, heads, width, own, weights, bits, powers, mixed)
        for i in range(len(k)):
            for c in range(w):
                mixed_of[i, c], to_mixed_of[i, c] = mixed[c, i], ZERO
        for channel in range(gradient.shape[1]):
            i, value = winner[j, channel], gradient[j, channel]
            for c in range(w):
                to_mixed_of[i, c] += value * weight[channel, c]
            for c in range(w):
                to_weight[channel, c] += value * mixed_of[i, c]
        for c in range(w):
            for i in range(len(k)):
                to_mixed[c, i] = factors[j] * to_mixed_of[i, c]
        for h in range(len(heads)):
            # The softmax: ds_ii' = a_ii' (da_ii' - sum_o a_io da_io).
            drift[:] = ZERO
            for o in range(len(k)):
                for i in range(len(k)):
                    to_one = ZERO
                    for c in range(len(width)):
                        to_one += own[2 * w + h * len(width) + c, o] * to_mixed[h * len(width) + c, i]
                    to_scores[o, i] = to_one
                    drift[i] += to_one * weights[h, o, i]
            for o in range(len(k)):
                for i in range(len(k)):
                    to_scores[o, i] = weights[h, o, i] * (to_scores[o, i] - drift[i])
            # Keys and values collect over i, so that they need both the other way round.
            for o in range(len(k)):
                for i in range(len(k)):
                    scores_by[i, o], weights_by[i, o] = to_scores[o, i], weights[h, o, i]
            for c in range(h * len(width), (h + 1) * len(width)):
                for i in range(len(k)):
                    to_query = ZERO
                    for o in range(len(k)):
                        to_query += to_scores[o, i] * own[w + c, o]
                    to_own[c, i] = to_query
                for o in range(len(k)):
                    to_key, to_value = ZERO, ZERO
                    for i in range(len(k)):
                        to_key += scores_by[i, o] * own[c, i]
                        to_value += weights_by[i, o] * to_mixed[c, i]
                    to_own[w + c, o], to_own[2 * w + c, o] = to_key, to_value
        for i in range(len(k)):
            for c in range(3 * w):
                to_qkv[rows[j, i], c] += to_own[c, i]
