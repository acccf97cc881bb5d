"""Attention within neighbourhoods and the maximum over each: in any parts what the equation says, with its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from point_peft.tuners.point_peft import local_attention
from point_peft.tuners.point_peft.local_attention import LocalAttention, largest

pytestmark = pytest.mark.smoke

B, N, S, K, C = 3, 20, 7, 5, 12


def some(heads: int = 2, *, drop_path: float = 0.0) -> tuple[LocalAttention, Tensor, Tensor]:
    """A module, tokens (b, n, c) and neighbours (b, s, k)."""
    torch.manual_seed(0)
    module = LocalAttention(C, 6, heads, drop_path).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    tokens = torch.randn(B, N, C, dtype=torch.float64, requires_grad=True)
    return module, tokens, torch.rand(B, S, N).topk(K).indices


def in_words(module: LocalAttention, tokens: Tensor, neighbour: Tensor, keep: Tensor) -> Tensor:
    """Neighbourhood by neighbourhood and head by head."""
    pooled = []
    for sample, near, kept in zip(tokens, neighbour, keep, strict=True):
        for rows, factor in zip(near, kept, strict=True):
            three = module.qkv(module.norm(sample[rows])).chunk(3, dim=1)
            q, key, v = (part.chunk(module.heads, dim=1) for part in three)
            heads = [(module.scale * q[h] @ key[h].T).softmax(dim=1) @ v[h] for h in range(module.heads)]
            pooled.append((sample[rows] + factor * module.proj(torch.cat(heads, dim=1))).amax(dim=0))
    return torch.stack(pooled).view(*neighbour.shape[:2], C)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("limit", [1, B * 2 * K * K * 5, 2**20], ids=["few", "some", "all at once"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_it_is_what_it_says_with_its_gradient(
    heads: int, limit: int, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_attention, "CHUNK_ELEMENTS", limit)
    module, tokens, neighbour = some(heads, drop_path=0.4)
    module.train(train)
    torch.manual_seed(1)
    keep = module._keep(tokens, B, S)
    assert set(keep.unique().tolist()) == ({0.0, 1 / 0.6} if train else {1.0})
    torch.manual_seed(1)
    found, expected = module.pooled(tokens, neighbour), in_words(module, tokens, neighbour, keep)
    torch.testing.assert_close(found, expected)
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(module.pooled(tokens, neighbour), expected)
    gradient, trained = torch.randn_like(found), (tokens, *module.parameters())
    ours, theirs = (torch.autograd.grad(output, trained, gradient) for output in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_it_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module, tokens, neighbour = some()
    seen: list[Any] = []
    module.register_forward_pre_hook(lambda module, args: seen.append((*args[0].shape[:2], len(args[1]))))
    monkeypatch.setattr(local_attention, "CHUNK_ELEMENTS", B * module.heads * K * K * 5)
    module.pooled(tokens, neighbour)
    assert seen == [(B, N, B * 5), (B, N, B * 2)]
    seen.clear()
    monkeypatch.setattr(local_attention, "CHUNK_ELEMENTS", 1)
    module.pooled(tokens, neighbour)
    assert N // K == 4
    assert seen == [(B, N, B * 4), (B, N, B * 3)]


def test_nothing_is_kept_of_what_is_made_for_each_neighbour() -> None:
    module, tokens, neighbour = some()
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module.pooled(tokens, neighbour)
    assert kept and max(kept) <= tokens.nbytes


def test_a_tensor_that_was_changed_ahead_of_the_backward_pass_is_noticed() -> None:
    module, tokens, neighbour = some()
    loss = module.pooled(tokens, neighbour).sum()
    with torch.no_grad():
        module.proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_exact_numbers(dtype: torch.dtype) -> None:
    module, tokens, neighbour = some()
    exact = module.pooled(tokens, neighbour).detach()
    scale, step = float(exact.abs().max()), torch.finfo(dtype).eps
    found = module.to(dtype).pooled(tokens.to(dtype), neighbour)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=8 * step * scale)
    for gradient in torch.autograd.grad(found.sum(), [*module.parameters()]):
        assert gradient.dtype is dtype and bool(torch.isfinite(gradient).all())


def sums(k: int, width: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (n, c), what the neighbours take up (m k, w), W (c, w) and which they are (m, k)."""
    torch.manual_seed(0)
    shapes = (N + k, C), (S * k, width), (C, width)
    U, taken, W = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return U, taken, W, torch.rand(S, N + k).topk(k).indices


@pytest.mark.parametrize("k", [K, 300], ids=["few", "more than a byte counts"])
@pytest.mark.parametrize("part", [1, 3 * K * C, 2**20], ids=["one by one", "three at a time", "all at once"])
def test_the_largest_is_that_of_torch_with_its_gradient(k: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_attention, "PART_ELEMENTS", part)
    U, taken, W, rows = sums(k)
    expected = (U[rows] + (taken @ W.T).view(S, k, C)).max(dim=1).values
    found, gradient = largest(U, taken, W, rows), torch.randn(S, C, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(largest(U, taken, W, rows), expected)
    ours, theirs = (torch.autograd.grad(output, (U, taken, W), gradient) for output in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_of_equal_neighbours_one_gets_the_gradient() -> None:
    U, taken, W, rows = sums(K)
    same = U[:1].expand(len(U), C).detach().clone().requires_grad_()
    found = largest(same, torch.zeros_like(taken), W, rows)
    assert torch.equal(found, same[rows[:, 0]])
    (gradient,) = torch.autograd.grad(found.sum(), same)
    assert torch.equal(gradient.sum(dim=0), torch.full_like(gradient[0], S)) and torch.equal(gradient, gradient.round())


def test_what_is_no_number_stays_none() -> None:
    U, taken, W, rows = sums(K)
    with torch.no_grad():
        U[rows[0, 1]] = torch.nan
    assert bool(largest(U, taken, W, rows)[0].isnan().all())
