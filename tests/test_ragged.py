"""Packed clouds: neighbours, sampling and interpolation, against brute force and the batched functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from point_peft import geometry
from point_peft.errors import PointPeftError
from point_peft.geometry import search
from tests.forks import Server
from tests.peak import peak

SIZES = [1, 300, 0, 17, 33, 2, 0, 1100, 64, 32]


def ends(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int64).cumsum(0)


def packed(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def samples(values: Tensor, offset: Tensor) -> list[Tensor]:
    return list(values.split(offset.diff(prepend=offset.new_zeros(1)).tolist()))


def distances(a: Tensor, b: Tensor) -> Tensor:
    x, y, z = ((one - other).square_() for one, other in zip(a.unbind(-1), b.unbind(-1), strict=True))
    return x.add_(y).add_(z)


def assert_nearest(found: Tensor, queries: Tensor, query_offset: Tensor, points: Tensor, offset: Tensor) -> None:
    """Distances bit for bit the smallest of all; each point once while there are enough, and of the own sample."""
    k = found.shape[1]
    assert found.dtype == torch.int64 and found.shape == (len(queries), k)
    parts = zip(samples(found, query_offset), samples(queries, query_offset), samples(points, offset), strict=True)
    for (rows, own, cloud), end in zip(parts, offset.tolist(), strict=True):
        if len(rows) == 0:
            continue
        here = rows - (end - len(cloud))
        assert int(here.min()) >= 0 and int(here.max()) < len(cloud)
        real = min(k, len(cloud))
        expected = distances(own[:, None], cloud).topk(real, dim=1, largest=False).values
        assert torch.equal(distances(own[:, None], cloud[here[:, :real]]), expected)
        assert bool((here[:, :real].sort(dim=1).values.diff() > 0).all())
        assert bool((here[:, real:] == here[:, :1]).all())


def shaped(kind: str, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    cube, normal = torch.rand(n, 3, generator=generator), torch.randn(n, 3, generator=generator)
    sphere: Tensor = normal / normal.norm(dim=1, keepdim=True)
    if kind == "sphere":
        return sphere
    if kind == "far":
        return cube + 1000
    if kind == "grid":
        return (cube * 9).floor()
    if kind == "few places":
        return cube[torch.arange(n) % 20]
    if kind == "one place":
        return torch.full((n, 3), 0.1)
    if kind == "line":
        return cube * torch.tensor([1.0, 0, 0])
    if kind == "dense and sparse":
        return sphere * torch.exp(cube[:, :1] * 9)
    assert kind == "outliers"
    return torch.where(torch.arange(n)[:, None] % 20 == 0, normal * 50, normal * 0.01)


SHAPES = ["sphere", "far", "grid", "few places", "one place", "line", "dense and sparse", "outliers"]


# Offsets and sample numbers


def test_offsets_and_sample_numbers_are_two_forms_of_one_thing() -> None:
    numbers = torch.tensor([0, 0, 2, 2, 2, 5])
    offset = torch.tensor([2, 2, 5, 5, 5, 6])
    assert torch.equal(geometry.offset_of(numbers), offset)
    assert torch.equal(geometry.samples_of(offset, 6), numbers)
    for value in (numbers, offset, numbers.int(), offset.int()):
        found = geometry.as_offset(value, 6)
        assert found.dtype == torch.int64 and torch.equal(found, offset)


@given(st.lists(st.integers(0, 5), max_size=8))
def test_the_two_forms_go_back_and_forth(sizes: list[int]) -> None:
    offset = ends(sizes)
    numbers = geometry.samples_of(offset, sum(sizes))
    known = len(sizes)
    while known and sizes[known - 1] == 0:
        known -= 1
    assert torch.equal(geometry.offset_of(numbers), offset[:known])
    assert torch.equal(geometry.as_offset(offset, sum(sizes)), offset)


def test_one_point_is_one_sample_in_either_form() -> None:
    for value in ([0], [1]):
        assert geometry.as_offset(torch.tensor(value), 1).tolist() == [1]
    assert geometry.as_offset(torch.tensor([1, 2, 3]), 3).tolist() == [1, 2, 3]
    assert geometry.as_offset(torch.empty(0, dtype=torch.int64), 0).tolist() == []
    assert geometry.as_offset(torch.zeros(2, dtype=torch.int64), 0).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0, 1, 0, 1], "must be sorted: number 0 follows 1 at point 2"),
        ([-1, 0, 0, 1], "must not be negative, got -1"),
        ([3, 2, 4], "offset must not decrease, but sample 1 ends at 2"),
        ([-1, 4], "offset must not decrease, but sample 0 ends at -1"),
        ([1, 3], "an offset that ends in 4 or one sample number for each of 4 points, got 2 numbers, the last 3"),
        ([0, 0, 0, 1, 1], "got 5 numbers, the last 1"),
        ([], "got no numbers"),
    ],
)
def test_what_is_neither_form_is_refused(value: list[int], message: str) -> None:
    with pytest.raises(PointPeftError, match=message):
        geometry.as_offset(torch.tensor(value, dtype=torch.int64), 4)


@pytest.mark.parametrize("value", [torch.ones(4), torch.ones(4, dtype=torch.bool), torch.ones(1, 4).long()])
def test_only_rows_of_integers_are_offsets(value: Tensor) -> None:
    points = packed(4)
    with pytest.raises(PointPeftError, match="must be integers of one dimension, got torch"):
        geometry.as_offset(value, 4)
    with pytest.raises(PointPeftError, match="samples must be integers of one dimension"):
        geometry.offset_of(value)
    with pytest.raises(PointPeftError, match="query_offset must be integers of one dimension"):
        geometry.ragged_knn(points, value, points, ends([4]), 1)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        ([2, 5], "offset must end in 6, the number of points, got 5"),
        ([4, 2, 6], "offset must not decrease, but sample 1 ends at 2"),
        ([], "offset must end in 6, the number of points, got 0"),
    ],
)
def test_bad_offsets_are_refused(offset: list[int], message: str) -> None:
    points, bad = packed(6), torch.tensor(offset, dtype=torch.int64)
    with pytest.raises(PointPeftError, match=message):
        geometry.samples_of(bad, 6)
    with pytest.raises(PointPeftError, match=f"query_{message}"):
        geometry.ragged_knn(points, bad, points, ends([6]), 1)
    with pytest.raises(PointPeftError, match=message):
        geometry.ragged_knn(points, ends([6]), points, bad, 1)
    with pytest.raises(PointPeftError, match=message):
        geometry.ragged_farthest_point_sample(points, bad, 0.5)


# Neighbours


@pytest.mark.parametrize("k", [1, 3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knn_equals_brute_force_in_each_sample(k: int, dtype: torch.dtype) -> None:
    offset = ends(SIZES)
    points = packed(int(offset[-1])).to(dtype)
    assert_nearest(geometry.ragged_knn(points, offset, points, offset, k), points, offset, points, offset)


@pytest.mark.parametrize("k", [1, 5, 33])
def test_knn_of_other_queries_equals_brute_force(k: int) -> None:
    sizes = [0, 5, 700, 0, 90, 1, 40, 3]
    query_offset = ends([0, 120, 50, 0, 1, 33, 400, 0])
    offset = ends(sizes)
    points, queries = packed(int(offset[-1])), packed(int(query_offset[-1]), seed=1) * 3
    found = geometry.ragged_knn(queries, query_offset, points, offset, k)
    assert_nearest(found, queries, query_offset, points, offset)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knn_equals_brute_force_on_hard_clouds(kind: str, dtype: torch.dtype) -> None:
    points, offset = shaped(kind, 2500).to(dtype), ends([1700, 800])
    assert_nearest(geometry.ragged_knn(points, offset, points, offset, 16), points, offset, points, offset)
    queries = packed(300).to(dtype) + points.mean(0)
    found = geometry.ragged_knn(queries, ends([100, 200]), points, offset, 7)
    assert_nearest(found, queries, ends([100, 200]), points, offset)


@pytest.mark.parametrize("kind", ["sphere", "grid", "outliers"])
def test_knn_equals_brute_force_through_several_levels_and_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "FAN", 3)
    monkeypatch.setattr(search, "PAIRS", 700)
    monkeypatch.setattr(search, "CHUNK_ELEMENTS", 5000)
    points, offset = shaped(kind, 1500), ends([1200, 10, 290])
    assert_nearest(geometry.ragged_knn(points, offset, points, offset, 6), points, offset, points, offset)


def test_knn_of_a_center_as_far_from_all() -> None:
    points, offset = shaped("sphere", 3000), ends([3000])
    queries = torch.zeros(40, 3)
    found = geometry.ragged_knn(queries, ends([40]), points, offset, 9)
    assert_nearest(found, queries, ends([40]), points, offset)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 120)), min_size=1, max_size=5),
    k=st.integers(1, 20),
    places=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_knn_equals_brute_force_on_any_grid(sizes: list[tuple[int, int]], k: int, places: int, seed: int) -> None:
    query_offset, offset = ends([m for m, _ in sizes]), ends([n for _, n in sizes])
    points = (packed(int(offset[-1]), seed) * places).round()
    queries = (packed(int(query_offset[-1]), seed + 1) * places).round()
    found = geometry.ragged_knn(queries, query_offset, points, offset, k)
    assert_nearest(found, queries, query_offset, points, offset)


def test_one_huge_sample_among_many_tiny_ones() -> None:
    sizes = [10] * 500 + [20_000] + [10] * 500
    offset = ends(sizes)
    points = packed(int(offset[-1]))
    found = geometry.ragged_knn(points, offset, points, offset, 12)
    some = torch.arange(5000, 25_000, 40)
    expected = distances(points[some][:, None], points[5000:25_000]).topk(12, dim=1, largest=False).values
    assert torch.equal(distances(points[some][:, None], points[found[some]]), expected)
    keep = torch.cat([torch.arange(5000), torch.arange(25_000, 30_000)])
    tiny = points[keep]
    here = torch.where(found[keep] >= 25_000, found[keep] - 20_000, found[keep])
    assert_nearest(here, tiny, ends([10] * 1000), tiny, ends([10] * 1000))


def test_knn_equals_the_batched_one() -> None:
    clouds = packed(4 * 130).reshape(4, 130, 3)
    expected = geometry.knn(clouds, clouds, 9) + torch.arange(4)[:, None, None] * 130
    points, offset = clouds.flatten(0, 1), ends([130] * 4)
    assert torch.equal(geometry.ragged_knn(points, offset, points, offset, 9), expected.flatten(0, 1))


def test_missing_neighbours_repeat_the_nearest() -> None:
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [5, 5, 5]])
    queries = torch.tensor([[0.9, 0, 0], [0, 0, 0]])
    found = geometry.ragged_knn(queries, ends([1, 1]), points, ends([2, 1]), 4)
    assert found.tolist() == [[1, 0, 1, 1], [2, 2, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    points, offset = (packed(300) * 300).to(dtype), ends([100, 200])
    wide = points.float()
    found = geometry.ragged_knn(points, offset, points, offset, 5)
    assert torch.equal(found, geometry.ragged_knn(wide, offset, wide, offset, 5))
    for one, other in zip(
        geometry.ragged_farthest_point_sample(points, offset, 0.3, block=64),
        geometry.ragged_farthest_point_sample(wide, offset, 0.3, block=64),
        strict=True,
    ):
        assert torch.equal(one, other)
    weights = geometry.nearest_weights(points, points, found)
    assert torch.equal(weights, geometry.nearest_weights(wide, wide, found))
    features = torch.rand(300, 4).to(dtype)
    carried = geometry.ragged_interpolate(features, found, weights)
    assert carried.dtype == dtype and torch.allclose(carried, features, atol=1e-2)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(2, 4, 3), r"must be \(n, 3\), got \(2, 4, 3\)"),
        (torch.zeros(4, 2), r"must be \(n, 3\), got \(4, 2\)"),
        (torch.zeros(4, 3, dtype=torch.int64), "must be floating point, got torch.int64"),
        (torch.tensor([[0.0, torch.nan, 0]] * 4), "holds values that are not finite"),
        (torch.full((4, 3), torch.inf), "holds values that are not finite"),
    ],
)
def test_wrong_clouds_are_refused(points: Tensor, message: str) -> None:
    good, offset = packed(4), ends([4])
    with pytest.raises(PointPeftError, match=f"points {message}"):
        geometry.ragged_knn(good, offset, points, offset, 1)
    with pytest.raises(PointPeftError, match=f"queries {message}"):
        geometry.ragged_knn(points, offset, good, offset, 1)
    with pytest.raises(PointPeftError, match=f"points {message}"):
        geometry.ragged_farthest_point_sample(points, offset, 0.5)
    with pytest.raises(PointPeftError, match=f"sources {message}"):
        geometry.nearest_weights(good, points, torch.zeros(4, 1, dtype=torch.int64))


def test_impossible_neighbours_are_refused() -> None:
    points = packed(4)
    with pytest.raises(PointPeftError, match="sample 1 has queries but no points"):
        geometry.ragged_knn(points, ends([2, 2]), points, ends([4, 0]), 1)
    with pytest.raises(PointPeftError, match="queries and points differ in batch size: 2 and 1"):
        geometry.ragged_knn(points, ends([2, 2]), points, ends([4]), 1)
    with pytest.raises(PointPeftError, match="cannot choose 0 points"):
        geometry.ragged_knn(points, ends([4]), points, ends([4]), 0)


def test_no_queries_have_no_neighbours() -> None:
    none = torch.empty(0, 3)
    assert geometry.ragged_knn(none, ends([0, 0]), packed(4), ends([4, 0]), 3).shape == (0, 3)
    assert geometry.ragged_knn(none, ends([]), none, ends([]), 3).shape == (0, 3)


# Sampling


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 1.0])
def test_samples_of_small_clouds_are_those_of_the_batched_function(ratio: float) -> None:
    sizes = [1, 1024, 5, 37, 0, 2, 2, 800, 64]
    offset = ends(sizes)
    points = packed(int(offset[-1]))
    index, found = geometry.ragged_farthest_point_sample(points, offset, ratio)
    counts = [max(1, round(ratio * n)) if n else 0 for n in sizes]
    assert found.tolist() == ends(counts).tolist()
    start = 0
    for n, chosen, cloud in zip(sizes, samples(index, found), samples(points, offset), strict=True):
        if n:
            alone = geometry.farthest_point_sample(cloud[None], len(chosen))[0]
            assert torch.equal(chosen - start, alone)
        start += n


@pytest.mark.parametrize("kind", ["grid", "one place", "few places"])
def test_samples_of_small_clouds_with_ties_are_those_of_the_batched_function(kind: str) -> None:
    points, offset = shaped(kind, 230), ends([150, 80])
    index, found = geometry.ragged_farthest_point_sample(points, offset, 0.4)
    assert found.tolist() == [60, 92]
    assert torch.equal(index[:60], geometry.farthest_point_sample(points[None, :150], 60)[0])
    assert torch.equal(index[60:] - 150, geometry.farthest_point_sample(points[None, 150:], 32)[0])


def test_counts_are_rounded_to_even_as_in_python() -> None:
    sizes = list(range(1, 40))
    for ratio in (0.5, 0.1, 0.25, 1 / 3):
        _, found = geometry.ragged_farthest_point_sample(packed(sum(sizes)), ends(sizes), ratio)
        assert found.tolist() == ends([max(1, round(ratio * n)) for n in sizes]).tolist()


def test_a_large_sample_is_sampled_block_by_block() -> None:
    points, offset = packed(10 + 1000), ends([10, 1000])
    index, found = geometry.ragged_farthest_point_sample(points, offset, 0.3, block=300)
    assert found.tolist() == [3, 3 + 4 * 75]
    assert len(index.unique()) == len(index)
    # Eight blocks of a cube on a Z-order curve are its octants, once they hold as many points each.
    corner = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    clusters = (corner[:, None] + packed(8 * 50).reshape(8, 50, 3) * 0.1)[:, :, [2, 1, 0]].reshape(400, 3)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    index, _ = geometry.ragged_farthest_point_sample(clusters[shuffled], ends([400]), 0.2, block=50)
    for octant, rows in enumerate(index.reshape(8, 10)):
        members = (shuffled // 50 == octant).nonzero()[:, 0]
        alone = geometry.farthest_point_sample(clusters[shuffled][members][None], 10)[0]
        assert torch.equal(rows, members[alone])


def test_samples_cover_a_large_cloud() -> None:
    points, offset = shaped("sphere", 6000), ends([6000])
    index, found = geometry.ragged_farthest_point_sample(points, offset, 0.1, block=512)
    nearest = geometry.ragged_knn(points, offset, points[index], found, 1)[:, 0]
    spread = distances(points, points[index][nearest]).max().sqrt()
    best = distances(points[:, None], points[geometry.farthest_point_sample(points[None], len(index))[0]]).amin(1)
    assert float(spread) < 2 * float(best.max().sqrt())


def test_degenerate_clouds_are_sampled() -> None:
    for kind in ("one place", "line", "few places"):
        points = shaped(kind, 700)
        index, found = geometry.ragged_farthest_point_sample(points, ends([700]), 0.5, block=100)
        assert found.tolist() == [350] and int(index.min()) >= 0 and int(index.max()) < 700
    index, found = geometry.ragged_farthest_point_sample(torch.empty(0, 3), ends([0, 0]), 0.5)
    assert len(index) == 0 and found.tolist() == [0, 0]


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, float("nan")])
def test_an_impossible_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(PointPeftError, match=f"ratio must be above 0 and at most 1, got {ratio}"):
        geometry.ragged_farthest_point_sample(packed(4), ends([4]), ratio)
    with pytest.raises(PointPeftError, match="block must be at least 1, got 0"):
        geometry.ragged_farthest_point_sample(packed(4), ends([4]), 0.5, block=0)


# Interpolation


def test_interpolation_is_the_weighted_sum() -> None:
    features, weights = torch.rand(9, 4), torch.rand(6, 3)
    index = torch.randint(0, 9, (6, 3), generator=torch.Generator().manual_seed(0))
    expected = (features[index] * weights[..., None]).sum(1)
    assert torch.allclose(geometry.ragged_interpolate(features, index, weights), expected)
    assert geometry.ragged_interpolate(features, index[:0], weights[:0]).shape == (0, 4)
    with pytest.raises(PointPeftError, match=r"got \(9, 4\), \(6, 3\) and \(6, 2\)"):
        geometry.ragged_interpolate(features, index, weights[:, :2])
    with pytest.raises(PointPeftError, match=r"got \(1, 9, 4\), \(6, 3\) and \(6, 3\)"):
        geometry.ragged_interpolate(features[None], index, weights)


def test_interpolation_equals_the_batched_one() -> None:
    sources, queries, features = (
        packed(40).reshape(2, 20, 3),
        packed(60, seed=1).reshape(2, 30, 3),
        torch.rand(2, 20, 5),
    )
    expected = geometry.nearest_interpolate(features, sources, queries)
    flat_sources, flat_queries = sources.flatten(0, 1), queries.flatten(0, 1)
    index = geometry.ragged_knn(flat_queries, ends([30, 30]), flat_sources, ends([20, 20]), 3)
    weights = geometry.nearest_weights(flat_queries, flat_sources, index)
    assert torch.allclose(weights.sum(1), torch.ones(60))
    found = geometry.ragged_interpolate(features.flatten(0, 1), index, weights)
    assert torch.equal(found, expected.flatten(0, 1))


def test_nearest_weights_refuse_an_index_that_does_not_fit() -> None:
    with pytest.raises(PointPeftError, match=r"index must be \(m, k\) for 4 queries, got \(3, 2\)"):
        geometry.nearest_weights(packed(4), packed(5), torch.zeros(3, 2, dtype=torch.int64))


def test_interpolation_is_differentiable_in_all() -> None:
    features = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    sources, queries = packed(6).double().requires_grad_(), packed(3, seed=1).double().requires_grad_()
    index = geometry.ragged_knn(queries, ends([1, 2]), sources, ends([2, 4]), 3)
    assert not index.requires_grad

    def carried(features: Tensor, sources: Tensor, queries: Tensor) -> Tensor:
        return geometry.ragged_interpolate(features, index, geometry.nearest_weights(queries, sources, index))

    assert torch.autograd.gradcheck(carried, (features, sources, queries))
    weights = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, w: geometry.ragged_interpolate(f, index, w), (features, weights))


# All together


@pytest.mark.parametrize("kind", ["sphere", "grid", "few places", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch_mates(kind: str, dtype: torch.dtype) -> None:
    sizes = [1, 5, 700, 0, 33, 1300, 3, 450]
    offset = ends(sizes)
    points, features = shaped(kind, int(offset[-1])).to(dtype), torch.rand(int(offset[-1]), 5, dtype=dtype)
    near = geometry.ragged_knn(points, offset, points, offset, 10)
    index, center_offset = geometry.ragged_farthest_point_sample(points, offset, 0.3, block=200)
    back = geometry.ragged_knn(points, offset, points[index], center_offset, 3)
    weights = geometry.nearest_weights(points, points[index], back)
    carried = geometry.ragged_interpolate(features[index], back, weights)
    starts = [end - size for end, size in zip(offset.tolist(), sizes, strict=True)]
    center_starts = [0, *center_offset.tolist()]
    for start, size, center_start in zip(starts, sizes, center_starts, strict=False):
        rows, end = slice(start, start + size), ends([size])
        own = points[rows].clone()
        assert torch.equal(geometry.ragged_knn(own, end, own, end, 10), near[rows] - start)
        own_index, own_end = geometry.ragged_farthest_point_sample(own, end, 0.3, block=200)
        assert torch.equal(own_index, index[center_start : center_start + len(own_index)] - start)
        own_back = geometry.ragged_knn(own, end, own[own_index], own_end, 3)
        assert torch.equal(own_back, back[rows] - center_start)
        own_weights = geometry.nearest_weights(own, own[own_index], own_back)
        own_carried = geometry.ragged_interpolate(features[rows][own_index], own_back, own_weights)
        assert torch.equal(own_carried, carried[rows])


def growth(file: str) -> Callable[[], None]:
    """KiB that all functions take for one large sample and a thousand tiny ones."""

    def work() -> None:
        generator = torch.Generator().manual_seed(0)
        huge = torch.randn(100_000, 3, generator=generator)
        huge = huge / huge.norm(dim=1, keepdim=True)
        points = torch.cat([huge, torch.rand(10_000, 3, generator=generator)])
        offset = torch.cat([torch.tensor([100_000]), 100_000 + 10 * torch.arange(1, 1001)])
        small = torch.tensor([40])
        geometry.ragged_knn(points[:40], small, points[:40], small, 16)
        before = peak()
        geometry.ragged_knn(points, offset, points, offset, 16)
        index, found = geometry.ragged_farthest_point_sample(points, offset, 0.25)
        near = geometry.ragged_knn(points, offset, points[index], found, 3)
        weights = geometry.nearest_weights(points, points[index], near)
        geometry.ragged_interpolate(torch.rand(len(index), 64), near, weights)
        Path(file).write_text(str(peak() - before), "utf-8")

    return work


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_scene_of_100_000_points_beside_1000_tiny_samples_stays_small(server: Server, tmp_path: Path) -> None:
    # KiB; a matrix of 1001 x 100,000 float32 has 391,000, all distances 39 million
    assert server.number(growth, tmp_path / "growth") < 400_000
