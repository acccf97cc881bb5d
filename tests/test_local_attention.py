"""Attention within neighbourhoods and its maximum: by hand as in plain words, in any chunks, with its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from point_peft.tuners.point_peft import chunked_attention, local_attention
from point_peft.tuners.point_peft.local_attention import pooled_attention

pytestmark = pytest.mark.smoke

SCALE = 0.3


def some(
    n: int = 40, k: int = 5, m: int = 17, c: int = 12, width: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, nn.LayerNorm, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, their norm, what makes query, key and value, the projection, neighbours, factors."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, c), (3 * width, c), (c, width)
    tokens, to_qkv, weight = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    norm = nn.LayerNorm(c, dtype=dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(c, generator=generator))
    rows = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(m)])
    keep = torch.rand(m, generator=generator).round().to(dtype) / 0.5
    return tokens, norm, to_qkv, weight, rows, keep


def in_words(
    tokens: Tensor, norm: nn.LayerNorm, to_qkv: Tensor, weight: Tensor, rows: Tensor, keep: Tensor | None, heads: int
) -> Tensor:
    """Neighbourhood by neighbourhood and head by head."""
    pooled = []
    for j, near in enumerate(rows):
        q, key, v = (part.chunk(heads, dim=1) for part in (norm(tokens[near]) @ to_qkv.T).chunk(3, dim=1))
        mixed = [(SCALE * q[h] @ key[h].T).softmax(dim=1) @ v[h] for h in range(heads)]
        added = torch.cat(mixed, dim=1) @ weight.T
        pooled.append((tokens[near] + (added if keep is None else keep[j] * added)).amax(dim=0))
    return torch.stack(pooled)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("chunk", [1, 200, 2**20])
@pytest.mark.parametrize("dropped", [True, False])
def test_it_is_what_it_says_with_its_gradient(
    heads: int, chunk: int, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_attention, "CHUNK_ELEMENTS", chunk)
    tokens, norm, to_qkv, weight, rows, keep = some()
    factors = keep if dropped else None
    args = (tokens, norm, to_qkv, weight, rows, factors, heads)
    expected, found = in_words(*args), pooled_attention(*args, SCALE)
    with torch.no_grad():
        assert torch.equal(pooled_attention(*args, SCALE), found)
    torch.testing.assert_close(found, expected)
    plain = local_attention._in_one(
        tokens, norm.weight, norm.bias, to_qkv, weight, rows, factors, heads, SCALE, norm.eps
    )
    torch.testing.assert_close(plain, expected)
    out = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    trained = (tokens, to_qkv, weight, *norm.parameters())
    theirs, ours = torch.autograd.grad(expected, trained, out), torch.autograd.grad(found, trained, out)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_kept_where_nothing_needs_a_gradient() -> None:
    tokens, norm, to_qkv, weight, rows, _ = some()
    output = pooled_attention(tokens.detach(), norm, to_qkv, weight.detach(), rows, None, 2, SCALE)
    (gradient,) = torch.autograd.grad(output.sum(), to_qkv)
    assert gradient.abs().sum() > 0
    norm.requires_grad_(False)
    assert not pooled_attention(
        tokens.detach(), norm, to_qkv.detach(), weight.detach(), rows, None, 2, SCALE
    ).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    tokens, norm, to_qkv, weight, rows, keep = some(dtype=dtype)
    found = pooled_attention(tokens, norm, to_qkv, weight, rows, keep, 2, SCALE)
    assert found.dtype is dtype
    gradients = torch.autograd.grad(found.sum(), (tokens, to_qkv, weight, *norm.parameters()))
    for gradient in gradients:
        assert gradient.dtype is dtype and bool(torch.isfinite(gradient).all())
    wide = [tensor.double() for tensor in (tokens, to_qkv, weight)]
    exact = pooled_attention(wide[0], norm.double(), wide[1], wide[2], rows, keep.double(), 2, SCALE)
    torch.testing.assert_close(found, exact.to(dtype))


def test_of_equal_neighbours_one_gets_the_gradient() -> None:
    tokens, norm, to_qkv, weight, rows, _ = some(n=6, k=4, m=3)
    with torch.no_grad():
        tokens[1:] = tokens[0].clone()
    output = pooled_attention(tokens, norm, to_qkv, torch.zeros_like(weight), rows, None, 2, SCALE)
    (gradient,) = torch.autograd.grad(output.sum(), tokens)
    torch.testing.assert_close(gradient.sum(dim=0), torch.full((12,), 3.0, dtype=torch.float64))


def test_more_neighbours_than_a_byte_counts() -> None:
    tokens, norm, to_qkv, weight, rows, _ = some(n=400, k=300, m=2)
    args = (tokens, norm, to_qkv, weight, rows, None, 2)
    ours = torch.autograd.grad(pooled_attention(*args, SCALE).sum(), tokens)
    theirs = torch.autograd.grad(in_words(*args).sum(), tokens)
    torch.testing.assert_close(ours, theirs)
