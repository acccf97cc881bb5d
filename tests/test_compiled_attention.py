"""Local attention compiled by numba: the same as in plain words, with its gradient, from any number of threads."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from point_peft.tuners.point_peft import chunked_attention, local_attention
from point_peft.tuners.point_peft.chunked_attention import Given
from point_peft.tuners.point_peft.local_attention import pooled_attention
from tests.test_local_attention import SCALE, in_words, some

numba = pytest.importorskip("numba", reason="the extra 'fast' is not installed")
compiled_attention = pytest.importorskip("point_peft.tuners.point_peft.compiled_attention")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_attention, "FEWEST_FOR_COMPILED", 0)
    monkeypatch.setattr(compiled_attention, "FEWEST_IN_PART", 4)


def steps_of(tokens: Tensor, to_qkv: Tensor, rows: Tensor) -> Any:
    tokens, to_qkv = tokens.detach(), to_qkv.detach()
    return local_attention._steps(Given(tokens, tokens @ to_qkv.T, to_qkv[: len(to_qkv) // 3].T, rows, None, 2))


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.usefixtures("torch_threads")
def test_it_is_what_it_says_with_its_gradient(heads: int, dropped: bool) -> None:
    tokens, norm, to_qkv, weight, rows, keep = some(dtype=torch.float32)
    assert steps_of(tokens, to_qkv, rows) is compiled_attention
    factors = keep if dropped else None
    found = pooled_attention(tokens, norm, to_qkv, weight, rows, factors, heads, SCALE)
    with torch.no_grad():
        assert torch.equal(pooled_attention(tokens, norm, to_qkv, weight, rows, factors, heads, SCALE), found)
    wide = [tensor.detach().double().requires_grad_() for tensor in (tokens, to_qkv, weight)]
    norm64 = nn.LayerNorm(norm.normalized_shape, dtype=torch.float64)
    norm64.load_state_dict(norm.state_dict())
    expected = in_words(wide[0], norm64, wide[1], wide[2], rows, keep.double() if dropped else None, heads)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
    out = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, (tokens, to_qkv, weight, *norm.parameters()), out)
    theirs = torch.autograd.grad(expected, (*wide, *norm64.parameters()), out.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-3, rtol=1e-3)


def test_the_exponential_is_exact_to_a_unit_in_the_last_place() -> None:
    x = -np.concatenate([[0], np.logspace(-8, np.log10(86.9), 20001)]).astype(np.float32)
    found, bits = x.copy(), np.empty(x.size, np.int32)
    compiled_attention._exponential(found, bits, bits.view(np.float32))
    expected = np.exp(x.astype(np.float64))
    assert np.all(np.abs(found - expected) <= np.spacing(expected.astype(np.float32)))
    ends, bits = np.array([-200, -np.inf, np.nan], np.float32), np.empty(3, np.int32)
    compiled_attention._exponential(ends, bits, bits.view(np.float32))
    assert np.all(ends[:2] < 1e-37) and np.isnan(ends[2])


def test_scores_far_apart_and_not_a_number() -> None:
    tokens, norm, to_qkv, weight, rows, _ = some(dtype=torch.float32)
    args = (norm, to_qkv.detach() * 100, weight.detach(), rows, None, 2)
    torch.testing.assert_close(pooled_attention(tokens, *args, SCALE), in_words(tokens, *args), atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        tokens[7] = torch.nan
    found, reached = pooled_attention(tokens, *args, SCALE), (rows == 7).any(dim=1)
    assert bool(reached.any()) and not bool(reached.all())
    assert torch.equal(found.isnan(), reached[:, None].expand_as(found))


def test_of_equal_neighbours_the_first_gets_the_gradient() -> None:
    tokens, norm, to_qkv, weight, rows, _ = some(n=6, m=3, dtype=torch.float32)
    with torch.no_grad():
        tokens[1:] = tokens[0].clone()
    output = pooled_attention(tokens, norm, to_qkv, torch.zeros_like(weight), rows, None, 2, SCALE)
    (gradient,) = torch.autograd.grad(output.sum(), tokens)
    assert torch.equal(gradient, nn.functional.one_hot(rows[:, 0], 6).sum(0)[:, None].expand_as(gradient).float())


@pytest.mark.usefixtures("torch_threads")
def test_many_threads_at_once_are_as_one() -> None:
    args = some(m=200, dtype=torch.float32)
    expected = pooled_attention(*args, 2, SCALE).detach()
    trained = args[0], args[2], args[3]
    gradients = torch.autograd.grad(pooled_attention(*args, 2, SCALE).sum(), trained)

    def again(_: int) -> bool:
        found = pooled_attention(*args, 2, SCALE)
        theirs = torch.autograd.grad(found.sum(), trained)
        return torch.equal(found, expected) and all(torch.equal(*pair) for pair in zip(theirs, gradients, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(again, range(64)))


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, _, to_qkv, _, rows, _ = some(dtype=torch.float32)
    assert steps_of(tokens, to_qkv, rows) is compiled_attention
    assert steps_of(tokens.double(), to_qkv.double(), rows) is chunked_attention
    assert steps_of(tokens, to_qkv, rows.repeat(1, 20)) is chunked_attention
    assert steps_of(tokens, to_qkv.repeat(20, 1), rows) is chunked_attention
    with FakeTensorMode() as mode:
        assert steps_of(*(mode.from_tensor(tensor) for tensor in (tokens, to_qkv, rows))) is chunked_attention
    monkeypatch.setattr(local_attention, "FEWEST_FOR_COMPILED", rows.numel() * tokens.shape[1] + 1)
    assert steps_of(tokens, to_qkv, rows) is chunked_attention


def test_who_counts_operations_counts_these() -> None:
    args = some(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        pooled_attention(*args, 2, SCALE)
    (m, k), (_, width) = args[4].shape, args[3].shape
    projected = 2 * m * k * width * args[0].shape[1]
    assert counter.get_total_flops() > projected


@pytest.fixture
def asked_again() -> Iterator[None]:
    local_attention._compiled_steps.cache_clear()
    yield
    local_attention._compiled_steps.cache_clear()


@pytest.mark.usefixtures("asked_again")
def test_without_numba_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tokens, _, to_qkv, _, rows, _ = some(dtype=torch.float32)
    assert steps_of(tokens, to_qkv, rows) is chunked_attention


@pytest.mark.usefixtures("asked_again")
def test_without_threads_to_share_with_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_attention, "PARALLEL", None)
    tokens, _, to_qkv, _, rows, _ = some(dtype=torch.float32)
    assert steps_of(tokens, to_qkv, rows) is chunked_attention


@pytest.mark.usefixtures("asked_again")
def test_a_numba_that_cannot_be_imported_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # What numba says where numpy is newer than it knows.
    monkeypatch.setitem(sys.modules, compiled_attention.__name__, None)
    tokens, _, to_qkv, _, rows, _ = some(dtype=torch.float32)
    monkeypatch.delattr("point_peft.tuners.point_peft.compiled_attention")
    with pytest.warns(UserWarning, match="local attention runs without numba: "):
        assert steps_of(tokens, to_qkv, rows) is chunked_attention
    assert steps_of(tokens, to_qkv, rows) is chunked_attention


def test_it_is_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # The one for packages in a zip file, which this is not.
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "ZipCacheLocator")
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(test_it_is_compiled_where_nothing_can_be_kept)

    def doubled(x: Any) -> None:
        x *= 2

    numbers = np.ones(3, np.float32)
    compiled_attention._compiled()(doubled)(numbers)
    assert numbers.tolist() == [2, 2, 2]


class Pooled(Dataset[Tensor]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        return pooled_attention(*some(dtype=torch.float32), 2, SCALE).detach()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("torch_threads")
def test_the_worker_of_a_loader_that_was_forked_from_many_threads() -> None:
    expected = Pooled()[0]
    loader = DataLoader(Pooled(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert torch.equal(next(iter(loader)), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_has_the_operations_and_not_their_result() -> None:
    tokens, norm, to_qkv, weight, rows, _ = some(dtype=torch.float32)
    args = (norm.requires_grad_(False), to_qkv.detach(), weight.detach(), rows, None, 2, SCALE)
    traced = torch.jit.trace(lambda x: pooled_attention(x, *args), tokens.detach())
    other = tokens.detach().flip(0)
    torch.testing.assert_close(traced(other), pooled_attention(other, *args))
