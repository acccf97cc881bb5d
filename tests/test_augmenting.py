"""Random changes of samples: what they draw, what follows the points, and that a seed repeats them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from point_peft.data.augmenting import AUGMENTATIONS, augment, random_rotation, rotation_about
from point_peft.data.cloud import Sample
from point_peft.errors import PointPeftError

NORMALS = (4, 5, 6)
N = 200


def sample(seed: int = 0) -> Sample:
    """A sample with normals at right angles to a sphere; a channel and the labels are the numbers of the rows."""
    normals = torch.nn.functional.normalize(torch.randn(N, 3, generator=torch.Generator().manual_seed(seed)), dim=1)
    rows = torch.arange(N)
    points = torch.cat([normals * 0.8, rows[:, None].float(), normals], dim=1)
    return Sample(points, rows, torch.tensor(3))


def changed(*names: str, seed: int = 0, of: Sample | None = None, normals: tuple[int, ...] | None = NORMALS) -> Sample:
    return augment(of or sample(), names, np.random.default_rng(seed), normals)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_labels_and_channels_follow_and_what_is_given_stays(name: str) -> None:
    given = sample()
    points, label, category = changed(name, of=given)
    assert points.shape == given.points.shape and points.dtype == torch.float32 and category == 3
    assert torch.equal(points[:, 3].long(), label)
    assert all(torch.equal(a, b) for a, b in zip(given, sample(), strict=True))
    assert name == "none" or not torch.equal(points, given.points)
    whole = changed(name, of=given._replace(label=torch.tensor(7)))
    assert whole.label == 7 and torch.equal(whole.points, points)


@pytest.mark.parametrize("name", sorted(set(AUGMENTATIONS) - {"none"}))
def test_a_seed_repeats_and_another_does_not(name: str) -> None:
    first, again, other = (changed(name, seed=seed).points for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", ["rotate", "rotate_y", "rotate_z", "rotate_small"])
def test_normals_turn_with_rotations_and_lengths_stay(name: str) -> None:
    points = changed(name).points
    assert torch.allclose(points[:, :3], points[:, 4:] * 0.8, atol=1e-6)
    assert torch.allclose(distances(points), distances(sample().points), atol=1e-6)
    assert torch.linalg.det(turn(name)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(changed(name, normals=None).points[:, 3:], sample().points[:, 3:])


def distances(points: Tensor) -> Tensor:
    return torch.cdist(points[:, :3].double(), points[:, :3].double())


def turn(name: str, seed: int = 0) -> Tensor:
    """The rotation (3, 3) that an augmentation applies."""
    axes = Sample(torch.eye(3), torch.tensor(0), torch.tensor(0))
    return changed(name, seed=seed, of=axes, normals=None).points.T


def test_rotations_about_an_axis_keep_it_and_reach_all_around() -> None:
    assert torch.equal(torch.from_numpy(rotation_about((0, 0, 1), np.pi / 2)).round()[:, 0], torch.tensor([0, 1, 0]))
    for name, axis in (("rotate_y", 1), ("rotate_z", 2)):
        turns = torch.stack([turn(name, seed) for seed in range(40)])
        assert torch.allclose(turns[:, axis], torch.eye(3)[axis].expand(40, 3))
        assert turns[:, 0, 0].min() < -0.9 and turns[:, 0, 0].max() > 0.9
        assert turns[:, 0, 2 if axis == 1 else 1].min() < -0.9


def test_small_rotations_are_small_and_others_are_uniform() -> None:
    angles = [torch.arccos((turn("rotate_small", seed).trace() - 1) / 2) for seed in range(100)]
    assert max(angles) < 0.19 and np.std(angles) > 0.02
    rng = np.random.default_rng(0)
    turns = np.stack([random_rotation(rng) for _ in range(2000)])
    # Of a uniform rotation, each entry of the matrix is the coordinate of a point on the sphere: uniform on [-1, 1].
    assert np.abs(turns.mean(axis=0)).max() < 0.05 and np.abs((turns**2).mean(axis=0) - 1 / 3).max() < 0.03


@pytest.mark.parametrize(
    ("name", "shift", "least", "most"), [("scale_translate", 0.2, 2 / 3, 1.5), ("stretch", 0, 0.9, 1.1)]
)
def test_scaling_and_shifting_stay_in_their_bounds_and_normals_stay_at_right_angles(
    name: str, shift: float, least: float, most: float
) -> None:
    x = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    for seed in range(20):
        points = changed(name, seed=seed, of=Sample(x, torch.tensor(0), torch.tensor(0)), normals=None)[0]
        assert (points[0].abs() <= shift).all() and (points[1] - points[0] >= least - 1e-3).all()
        assert (points[1] - points[0] <= most + 1e-3).all()
    plane = torch.tensor([[1.0, -1, 0, 0, 0.5**0.5, 0.5**0.5, 0], [-1, 1, 0, 0, 0.5**0.5, 0.5**0.5, 0]])
    points = changed(name, of=Sample(plane, torch.tensor(0), torch.tensor(0)))[0]
    assert (points[0, :3] - points[1, :3]) @ points[0, 4:] == pytest.approx(0, abs=1e-6)
    assert points[:, 4:].norm(dim=1).tolist() == pytest.approx([1, 1])


def test_jitter_is_small_noise() -> None:
    noise = changed("jitter").points - sample().points
    assert noise[:, :3].abs().max() <= 0.0501 and noise[:, :3].std() == pytest.approx(0.01, rel=0.1)
    assert (noise[:, 3:] == 0).all()


def test_dropout_puts_the_first_kept_point_in_the_places_of_others() -> None:
    shares = []
    for seed in range(30):
        label = changed("dropout", seed=seed).label
        moved = label != torch.arange(N)
        first = label[moved][0] if moved.any() else torch.tensor(0)
        assert (label[moved] == first).all() and (label[:first] == first).all()
        shares.append(moved.float().mean().item())
    assert min(shares) < 0.2 and 0.7 < max(shares) < 0.95


def test_augmentations_compose_in_the_order_given() -> None:
    both = changed("scale_translate", "rotate", seed=5).points
    rng = np.random.default_rng(5)
    one = augment(sample(), ["scale_translate"], rng, NORMALS)
    assert torch.equal(both, augment(one, ["rotate"], rng, NORMALS).points)
    assert not torch.equal(both, changed("rotate", "scale_translate", seed=5).points)
    assert torch.equal(changed().points, sample().points)


def test_an_unknown_name_is_told_before_anything_is_drawn() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(
        PointPeftError, match="augmentation 'rotate_x' is unknown; there are none, .*; nearest: 'rotate"
    ):
        augment(sample(), ["jitter", "rotate_x"], rng)
    assert rng.random() == np.random.default_rng(0).random()
