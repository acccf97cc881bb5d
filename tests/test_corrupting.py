"""Corruptions of test clouds: as defined, ever stronger, repeatable, and of as many points as before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from point_peft.data.corrupting import CORRUPTIONS, SEVERITIES, corrupt
from point_peft.errors import PointPeftError

N = 400


def cloud() -> Tensor:
    """Points in the unit sphere with the number of the row as a channel."""
    coordinates = torch.nn.functional.normalize(torch.randn(N, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    return torch.cat([coordinates, torch.arange(N)[:, None].float()], dim=1)


def corrupted(kind: str, severity: int = 3, seed: int = 0, points: Tensor | None = None) -> tuple[Tensor, Tensor]:
    given = cloud() if points is None else points
    changed, labels = corrupt(given, torch.arange(len(given)), kind, severity, np.random.default_rng(seed))
    assert labels is not None
    return changed, labels


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_number_of_points_stays_and_labels_follow(kind: str, severity: int) -> None:
    given = cloud()
    points, labels = corrupted(kind, severity, points=given)
    assert points.shape == given.shape and points.dtype == given.dtype and torch.equal(given, cloud())
    assert torch.equal(points[:, 3].long(), labels) and not torch.equal(points, given)
    whole, label = corrupt(given, torch.tensor(2), kind, severity, np.random.default_rng(0))
    assert torch.equal(whole, points) and label is not None and label == 2
    assert corrupt(given, None, kind, severity, np.random.default_rng(0))[1] is None


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_seed_repeats_and_another_does_not(kind: str) -> None:
    first, again, other = (corrupted(kind, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_each_corruption_is_as_strong_as_stated(severity: int) -> None:
    noise = corrupted("jitter", severity)[0] - cloud()
    assert noise[:, :3].std() == pytest.approx(0.01 * severity, rel=0.1)
    left = len(corrupted("dropout", severity)[1].unique())
    assert left == N - N * (1 + severity) // 8
    assert len(corrupted("occlusion", severity)[1].unique()) == N - N * severity // 10
    turns = [angle(severity, seed) for seed in range(40)]
    assert 12 * severity < max(turns) <= 18 * severity + 0.1 and min(turns) < 6 * severity
    lost = 1 - len(corrupted("density", severity)[1].unique()) / N  # t is uniform on a sphere
    assert lost == pytest.approx((4 + severity) / 20, abs=0.08)


def angle(severity: int, seed: int) -> float:
    """The degrees by which the axes are turned."""
    turn, _ = corrupted("rotation", severity, seed, torch.eye(3))
    return float(torch.rad2deg(torch.arccos(((turn.trace() - 1) / 2).clamp(-1, 1))))


def test_occlusion_takes_one_side_and_density_thins_along_a_direction() -> None:
    _, labels = corrupted("occlusion", 5)
    lost = torch.ones(N, dtype=torch.bool).index_fill(0, labels, False)
    far = torch.nn.functional.normalize(cloud()[lost, :3].mean(dim=0), dim=0)
    assert (cloud()[lost, :3] @ far).min() > -0.3 and (cloud()[~lost, :3] @ far).max() < 0.3
    _, labels = corrupted("density", 5)
    kept = torch.zeros(N).index_fill(0, labels, 1)
    thin = torch.linalg.lstsq(torch.cat([cloud()[:, :3], torch.ones(N, 1)], dim=1), kept[:, None]).solution[:3, 0]
    assert thin.norm() == pytest.approx(0.45, abs=0.15)  # 0.9 over a diameter of 2


def test_normals_turn_with_a_rotation() -> None:
    points = torch.cat([cloud()[:, :3]] * 2, dim=1)
    turned, _ = corrupt(points, None, "rotation", 4, np.random.default_rng(0), normals=(3, 4, 5))
    assert torch.allclose(turned[:, :3], turned[:, 3:]) and not torch.allclose(turned, points)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_tiny_clouds_and_clouds_at_one_place_keep_a_point(kind: str, n: int) -> None:
    points, labels = corrupted(kind, 5, points=torch.zeros(n, 3))
    assert points.shape == (n, 3) and len(labels) == n


def test_unknown_kinds_and_severities() -> None:
    with pytest.raises(PointPeftError, match="corruption 'jiter' is unknown; there are jitter, .*; nearest: 'jitter'"):
        corrupted("jiter")
    for severity in (0, 6):
        with pytest.raises(PointPeftError, match=f"severity is {severity}; allowed: 1 .least. to 5"):
            corrupted("jitter", severity)
