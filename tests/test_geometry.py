"""Sampling, neighbours and interpolation, against plain loops and known geometry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from point_peft import geometry
from point_peft.errors import PointPeftError
from point_peft.geometry import neighbours as eager
from point_peft.geometry.neighbours import _farthest_by_torch_fps, farthest_in_loop
from tests.forks import Server
from tests.peak import peak


def clouds(b: int, n: int, seed: int = 0) -> Tensor:
    return torch.rand(b, n, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def farthest_by_loop(cloud: Tensor, count: int) -> list[int]:
    chosen = [0]
    while len(chosen) < count:
        nearest = [min(float((p - cloud[c]).square().sum()) for c in chosen) for p in cloud]
        chosen.append(nearest.index(max(nearest)))
    return chosen


def test_squared_distance_is_exact_far_from_the_origin() -> None:
    a, b = clouds(2, 5), clouds(2, 7, seed=1)
    expected = (a.double()[:, :, None] - b.double()[:, None]).square().sum(3)
    assert torch.allclose(geometry.squared_distance(a, b).double(), expected, atol=1e-6)
    far_a, far_b = a + 100, b + 100
    expected = (far_a.double()[:, :, None] - far_b.double()[:, None]).square().sum(3)
    assert torch.allclose(geometry.squared_distance(far_a, far_b).double(), expected, atol=1e-6)


def test_squared_distance_has_a_finite_gradient_at_zero() -> None:
    a = clouds(1, 4).requires_grad_()
    distances = geometry.squared_distance(a, a.detach())
    (everywhere,) = torch.autograd.grad(distances.sum(), a, retain_graph=True)
    assert everywhere.isfinite().all()
    (at_zero,) = torch.autograd.grad(distances.diagonal(dim1=1, dim2=2).sum(), a)
    assert not at_zero.any()


def test_farthest_point_sample_equals_a_plain_loop() -> None:
    points = clouds(3, 37)
    index = geometry.farthest_point_sample(points, 11)
    assert index.dtype == torch.int64
    assert index.tolist() == [farthest_by_loop(cloud, 11) for cloud in points]


def test_farthest_point_sample_takes_the_lowest_index_of_a_tie() -> None:
    corners = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]])
    assert geometry.farthest_point_sample(corners, 5).tolist() == [[0, 1, 2, 3, 4]]
    same = torch.ones(1, 4, 3)
    assert geometry.farthest_point_sample(same, 4).tolist() == [[0, 0, 0, 0]]


def uneven(n: int = 60) -> Tensor:
    """Clouds: of points anywhere, of fewer places than points, of a grid, all at one place."""
    first, second, third, fourth = clouds(4, n)
    return torch.stack([first, second[torch.arange(n) % 7], third.mul(3).round(), fourth[:1].expand(n, 3)])


def test_an_operator_stands_for_the_loop_in_compiled_code() -> None:
    points = uneven()
    sampled = torch.ops.point_peft.farthest_point_sample(points, 20)
    assert torch.equal(sampled, geometry.farthest_point_sample(points, 20))
    near = torch.ops.point_peft.nearest(points[:, :5], points, 6)
    assert torch.equal(near, geometry.knn(points[:, :5], points, 6))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.point_peft.farthest_point_sample, (points, 20), test_utils=checks)
    torch.library.opcheck(torch.ops.point_peft.nearest, (points[:, :5], points, 6), test_utils=checks)


def test_torch_fps_takes_the_same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_fps = pytest.importorskip("torch_fps", reason="the extra 'fast' is not installed")
    # Its form in plain torch, which needs no compiler; like the kernels it takes the lowest index of a tie.
    monkeypatch.setattr(torch_fps.api._cpu, "get_module", lambda: None)
    points = uneven()
    for count in (1, 20, 60):
        assert torch.equal(_farthest_by_torch_fps(points, count), farthest_in_loop(points, count))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch_fps is used on a GPU")
def test_torch_fps_takes_the_same_points_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fps", reason="the extra 'fast' is not installed")
    points = uneven().cuda()
    fast = geometry.farthest_point_sample(points, 20)
    monkeypatch.setattr(eager, "torch_fps", None)
    assert torch.equal(fast, geometry.farthest_point_sample(points, 20))


def test_farthest_point_sample_of_all_points_visits_each_once() -> None:
    assert geometry.farthest_point_sample(clouds(2, 9), 9).sort(dim=1).values.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("count", [0, 9])
def test_farthest_point_sample_refuses_an_impossible_count(count: int) -> None:
    with pytest.raises(PointPeftError, match=f"cannot choose {count} of 8 points"):
        geometry.farthest_point_sample(clouds(1, 8), count)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(1, 0, 3), "holds no points"),
        (torch.zeros(1, 3, 8), r"must be \(b, n, 3\), got \(1, 3, 8\)"),
        (torch.zeros(8, 3), r"must be \(b, n, 3\), got \(8, 3\)"),
        (torch.zeros(1, 8, 3, dtype=torch.int64), "must be floating point, got torch.int64"),
    ],
)
def test_wrong_clouds_are_refused(points: Tensor, message: str) -> None:
    with pytest.raises(PointPeftError, match=message):
        geometry.farthest_point_sample(points, 1)
    with pytest.raises(PointPeftError, match=message):
        geometry.knn(clouds(1, 2), points, 1)
    with pytest.raises(PointPeftError, match=message):
        geometry.squared_distance(clouds(1, 2), points)


def test_knn_equals_a_full_sort_and_comes_nearest_first() -> None:
    queries, points = clouds(2, 6, seed=1), clouds(2, 50)
    distances = (queries.double()[:, :, None] - points.double()[:, None]).square().sum(3)
    assert torch.equal(geometry.knn(queries, points, 8), distances.argsort(dim=2)[:, :, :8])


def test_knn_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, points = clouds(2, 13, seed=1), clouds(2, 40)
    whole = geometry.knn(queries, points, 5)
    for elements in (1, 3 * 2 * 40, 12 * 2 * 40):
        monkeypatch.setattr(eager, "CHUNK_ELEMENTS", elements)
        assert torch.equal(geometry.knn(queries, points, 5), whole)


def growth(file: str) -> Callable[[], None]:
    """MB that neighbours in a large cloud take."""

    def work() -> None:
        points = torch.rand(1, 100_000, 3)
        geometry.knn(points[:, :20], points, 16)
        before = peak()
        geometry.knn(points[:, :1000], points, 16)
        Path(file).write_text(str((peak() - before) * 1024 / 1e6), "utf-8")

    return work


def test_knn_takes_memory_for_its_result_alone(server: Server, tmp_path: Path) -> None:
    """All distances at once would be 400 MB."""
    assert server.number(growth, tmp_path / "growth") < 40


def test_knn_is_exact_far_from_the_origin() -> None:
    points = clouds(1, 200).round(decimals=2)
    far = points.double() + 1000
    exact = geometry.knn(far[:, :20], far, 6)
    found = geometry.knn(far[:, :20].float(), far.float(), 6)
    distance = geometry.squared_distance(far[:, :20], far)
    assert torch.allclose(distance.gather(2, found), distance.gather(2, exact), atol=1e-3)
    assert torch.equal(found[:, :, 0], torch.arange(20)[None])


@pytest.mark.parametrize("k", [0, 9])
def test_knn_refuses_an_impossible_count(k: int) -> None:
    with pytest.raises(PointPeftError, match=f"cannot choose {k} of 8 points"):
        geometry.knn(clouds(1, 2), clouds(1, 8), k)


def test_different_batch_sizes_are_refused() -> None:
    with pytest.raises(PointPeftError, match="queries and points differ in batch size: 2 and 1"):
        geometry.knn(clouds(2, 2), clouds(1, 8), 1)


def test_gather_takes_rows_of_the_own_sample() -> None:
    features = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    index = torch.tensor([[[3, 0], [1, 1]], [[2, 2], [0, 3]]])
    rows = geometry.gather(features, index)
    assert rows.shape == (2, 2, 2, 3)
    assert rows.tolist() == [[[features[i, j].tolist() for j in row] for row in index[i]] for i in range(2)]
    assert torch.equal(geometry.gather(features, torch.tensor([3, 1])), features[[0, 1], [3, 1]])


def test_gather_passes_gradients_to_each_use() -> None:
    features = torch.zeros(1, 3, 2, requires_grad=True)
    geometry.gather(features, torch.tensor([[2, 2, 0]])).sum().backward()
    assert features.grad is not None and features.grad[0, :, 0].tolist() == [1.0, 0.0, 2.0]


def test_gather_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(PointPeftError, match=r"got \(2, 3, 4\) and \(1, 5\)"):
        geometry.gather(torch.zeros(2, 3, 4), torch.zeros(1, 5, dtype=torch.int64))


def test_inverse_distance_weights_sum_to_one_and_peak_at_a_source() -> None:
    sources = clouds(2, 6)
    weights = geometry.inverse_distance_weights(clouds(2, 9, seed=1), sources)
    assert weights.shape == (2, 9, 6)
    assert torch.allclose(weights.sum(2), torch.ones(2, 9))
    assert torch.allclose(geometry.inverse_distance_weights(sources, sources), torch.eye(6).expand(2, 6, 6), atol=1e-5)
    one = geometry.inverse_distance_weights(torch.zeros(1, 1, 3), torch.tensor([[[1.0, 0, 0], [0, 2, 0]]]))
    assert one.flatten().tolist() == pytest.approx([0.8, 0.2])


def test_inverse_distance_weights_are_differentiable_in_both() -> None:
    queries, sources = clouds(1, 3, seed=1).double().requires_grad_(), clouds(1, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(geometry.inverse_distance_weights, (queries, sources))


def test_interpolate_is_the_weighted_sum() -> None:
    features, weights = torch.rand(2, 5, 4), torch.rand(2, 3, 5)
    expected = (weights[..., None] * features[:, None]).sum(2)
    assert torch.allclose(geometry.interpolate(features, weights), expected)
    with pytest.raises(PointPeftError, match=r"got \(2, 5, 4\) and \(2, 5, 3\)"):
        geometry.interpolate(features, weights.transpose(1, 2))


def test_nearest_interpolate_with_all_sources_equals_interpolate() -> None:
    features, sources, queries = torch.rand(2, 5, 4), clouds(2, 5), clouds(2, 8, seed=1)
    expected = geometry.interpolate(features, geometry.inverse_distance_weights(queries, sources))
    assert torch.allclose(geometry.nearest_interpolate(features, sources, queries, k=5), expected, atol=1e-6)


def test_nearest_interpolate_reads_only_the_nearest() -> None:
    features, sources, queries = torch.rand(1, 30, 4), clouds(1, 30), clouds(1, 2, seed=1)
    found = geometry.nearest_interpolate(features, sources, queries, k=3)
    near = geometry.knn(queries, sources, 3)
    for i in range(2):
        weights = geometry.inverse_distance_weights(queries[:, i : i + 1], sources[:, near[0, i]])
        assert torch.allclose(found[:, i : i + 1], geometry.interpolate(features[:, near[0, i]], weights), atol=1e-6)
    assert torch.allclose(geometry.nearest_interpolate(features, sources, sources), features, atol=1e-5)
    with pytest.raises(PointPeftError, match=r"got \(1, 29, 4\) and \(1, 30, 3\)"):
        geometry.nearest_interpolate(features[:, 1:], sources, queries)


def test_nearest_interpolate_is_differentiable_in_all() -> None:
    features = torch.rand(1, 6, 2, dtype=torch.float64, requires_grad=True)
    sources, queries = clouds(1, 6).double().requires_grad_(), clouds(1, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(geometry.nearest_interpolate, (features, sources, queries))


# ---- a curve ---------------------------------------------------------------------------------------------------------


def along_curve(cloud: Tensor) -> list[int]:
    """The numbers of points (n, 3) along the curve, digit by digit."""
    corner = cloud.min(dim=0).values
    side = float((cloud - corner).max()) or 1.0
    codes = []
    for number, point in enumerate(cloud):
        cells = [int(float((point[axis] - corner[axis]) / side) * 1023) for axis in range(3)]
        codes.append(("".join(str(cells[axis] >> bit & 1) for bit in reversed(range(10)) for axis in range(3)), number))
    return [number for _, number in sorted(codes)]


def test_a_z_order_takes_x_ahead_of_y_and_z_bit_by_bit() -> None:
    corners = torch.cartesian_prod(*[torch.arange(2.0)] * 3)  # z fastest
    assert geometry.morton_order(corners[None]).tolist() == [list(range(8))]
    # The longest side alone counts: of two cells in z here the second is the 512th of x.
    assert geometry.morton_order(torch.tensor([[[1.0, 0, 0], [0, 0, 0.5], [0, 0, 0]]])).tolist() == [[2, 1, 0]]
    points = clouds(3, 50) * torch.tensor([1.0, 3.0, 0.2])
    order = geometry.morton_order(points)
    assert order.tolist() == [along_curve(cloud) for cloud in points]
    assert torch.equal(geometry.morton_order(4 * points - 1), order)


def test_a_z_order_is_the_same_packed_and_alone() -> None:
    sizes, points = [50, 0, 1, 20, 50], torch.cat([clouds(1, 71)[0], clouds(1, 50, seed=1)[0] + 7])
    offset = torch.tensor(sizes).cumsum(0)
    order = geometry.ragged_morton_order(points, offset).split(sizes)
    for own, cloud, end, n in zip(order, points.split(sizes), offset, sizes, strict=True):
        if n:
            assert torch.equal(own - (end - n), geometry.morton_order(cloud[None])[0])
    with pytest.raises(PointPeftError, match="offset must end in 121, the number of points, got 120"):
        geometry.ragged_morton_order(points, offset - 1)


def test_points_in_one_cell_keep_their_order() -> None:
    points = clouds(2, 10).repeat(1, 3, 1)
    places = geometry.morton_order(points).view(2, 10, 3)
    assert bool((places.diff(dim=2) == 10).all())
    assert geometry.morton_order(torch.ones(1, 4, 3)).tolist() == [[0, 1, 2, 3]]


def test_a_point_that_is_nowhere_changes_the_order_of_its_own_cloud_alone() -> None:
    points = clouds(2, 30)
    expected = geometry.morton_order(points)[1]
    points[0, 4, 1] = torch.nan
    packed = geometry.ragged_morton_order(points.flatten(0, 1), torch.tensor([30, 60])).view(2, 30)
    for order in (geometry.morton_order(points), packed % 30):
        assert torch.equal(order[1], expected) and order[0].sort().values.tolist() == list(range(30))


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_distances_are_taken_in_float32(dtype: torch.dtype) -> None:
    points = (clouds(2, 40) * 300).to(dtype)
    wide = points.float()
    assert torch.equal(geometry.squared_distance(points, points), geometry.squared_distance(wide, wide))
    assert torch.equal(geometry.farthest_point_sample(points, 8), geometry.farthest_point_sample(wide, 8))
    assert torch.equal(geometry.knn(points, points, 4), geometry.knn(wide, wide, 4))
    features = torch.rand(2, 40, 5).to(dtype)
    found = geometry.nearest_interpolate(features, points, points)
    assert found.dtype == dtype
    assert torch.allclose(found, features, atol=1e-2)


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    points, features = clouds(5, 101), torch.rand(5, 101, 7)
    index = geometry.farthest_point_sample(points, 20)
    center = geometry.gather(points, index)
    near = geometry.knn(center, points, 6)
    carried = geometry.nearest_interpolate(geometry.gather(features, index), center, points)
    for i in range(5):
        one = slice(i, i + 1)
        assert torch.equal(geometry.farthest_point_sample(points[one], 20), index[one])
        assert torch.equal(geometry.knn(center[one], points[one], 6), near[one])
        alone = geometry.nearest_interpolate(geometry.gather(features[one], index[one]), center[one], points[one])
        assert torch.equal(alone, carried[one])
