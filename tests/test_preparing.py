"""From a measured cloud to points: what is dropped, centred, scaled and chosen, and what follows the points."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from point_peft.data.cloud import UNKNOWN, Cloud, Entry
from point_peft.data.cloud_set import CloudSet
from point_peft.data.preparing import Preparation, Prepared, prepare
from point_peft.errors import DataError, PointPeftError
from point_peft.schema import from_json, to_json

AS_IT_IS = Preparation(num_points=None, centre="none", scale="none")


def cloud(n: int = 50, seed: int = 0, **fields: Any) -> Cloud:
    """A cloud whose labels and whose intensity are the numbers of its rows."""
    coordinates = np.random.default_rng(seed).normal(size=(n, 3))
    rows = np.arange(n)
    given: dict[str, Any] = {
        "coordinates": coordinates,
        "channels": {"intensity": rows.astype(np.float32)},
        "labels": rows,
        "source": "a.ply",
    }
    return Cloud(**{**given, **fields})


def prepared(cloud: Cloud, preparation: Preparation, seed: int = 0) -> Prepared:
    return prepare(cloud, preparation, np.random.default_rng(seed))


@pytest.mark.parametrize("num_points", [None, 1, 20, 50, 80])
@pytest.mark.parametrize("centre", ["mean", "median", "ground", "none"])
@pytest.mark.parametrize("reach", [None, 1.5])
def test_labels_channels_and_rows_follow_the_points(num_points: int | None, centre: Any, reach: float | None) -> None:
    measured = cloud()
    preparation = Preparation(
        num_points=num_points, centre=centre, reach=reach, scale=2.0, channels=("x", "y", "z", "intensity")
    )
    points, labels, rows = prepared(measured, preparation)
    assert points.dtype == np.float32 and labels is not None and labels.dtype == np.int64
    assert num_points is None or len(points) == num_points
    assert (labels == rows).all() and (points[:, 3] == rows).all()
    moved = measured.coordinates[rows] - 2 * points[:, :3]
    assert np.allclose(moved, moved[0], atol=1e-5)


def test_more_points_are_drawn_once_and_fewer_are_all_taken_and_copied() -> None:
    few = prepared(cloud(), replace(AS_IT_IS, num_points=20)).rows
    assert len(set(few)) == 20 and (np.diff(few) > 0).all()
    many = prepared(cloud(), replace(AS_IT_IS, num_points=80)).rows
    assert (many[:50] == np.arange(50)).all() and len(many) == 80


def test_a_seed_draws_the_same_points_and_another_draws_others() -> None:
    few = replace(AS_IT_IS, num_points=20)
    first, again, other = (prepared(cloud(), few, seed).points for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_centres() -> None:
    measured = cloud()
    means, lows = measured.coordinates.mean(axis=0), measured.coordinates.min(axis=0)
    places = {"mean": means, "median": np.median(measured.coordinates, axis=0), "ground": [*means[:2], lows[2]]}
    for centre, place in {**places, "none": np.zeros(3)}.items():
        points = prepared(measured, Preparation(num_points=None, centre=centre, scale="none")).points  # type: ignore[arg-type]
        assert np.allclose(points, measured.coordinates - place, atol=1e-6)


def test_the_farthest_point_lies_at_one_and_a_cloud_at_one_place_stays() -> None:
    points = prepared(cloud(), Preparation(num_points=None)).points
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1)
    assert (prepared(cloud(coordinates=np.full((50, 3), 7.0)), Preparation(num_points=60)).points == 0).all()


def test_reach_drops_what_is_far_before_the_sphere_is_scaled() -> None:
    far = cloud().coordinates
    far[3] = 55
    points, _, rows = prepared(cloud(coordinates=far), Preparation(num_points=None, centre="median", reach=5))
    assert 3 not in rows and len(rows) == 49 and np.linalg.norm(points, axis=1).max() == pytest.approx(1)


def test_millimetres_stay_at_coordinates_of_850_000_feet() -> None:
    steps = np.arange(50)[:, None] * 0.003
    places = np.array([[637_000.0, 850_000.0, 400.0]]) + steps
    points = prepared(cloud(coordinates=places), Preparation(num_points=None, scale="none")).points
    assert np.allclose(np.diff(points, axis=0), 0.003, atol=1e-6)


def test_bad_rows_are_dropped_with_a_count() -> None:
    places = cloud().coordinates
    places[[4, 7], [0, 2]] = np.nan, np.inf
    with pytest.warns(UserWarning, match="a.ply: 2 of 50 points hold NaN or infinity and are dropped"):
        points, labels, rows = prepared(cloud(coordinates=places), replace(AS_IT_IS, num_points=60))
    assert np.isfinite(points).all() and not {4, 7} & set(rows) and labels is not None and (labels == rows).all()


def test_only_channels_that_are_asked_for_make_a_row_bad() -> None:
    channels = {"intensity": np.where(np.arange(50) == 9, np.nan, 1).astype(np.float32)}
    assert len(prepared(cloud(channels=channels), AS_IT_IS).rows) == 50
    asked = replace(AS_IT_IS, channels=("x", "y", "z", "intensity"))
    with pytest.warns(UserWarning, match="1 of 50 points"):
        assert 9 not in prepared(cloud(channels=channels), asked).rows


def holes(count: int) -> np.ndarray:
    places = cloud().coordinates
    places[:count] = np.nan
    return places


@pytest.mark.parametrize(
    ("fields", "preparation", "match"),
    [
        ({"coordinates": holes(6)}, AS_IT_IS, r"a.ply: 6 of 50 points hold NaN .* than most_bad=0.1 allows; mend"),
        ({"coordinates": holes(50)}, replace(AS_IT_IS, most_bad=1.0), "50 of 50 points hold NaN"),
        ({"coordinates": np.zeros((0, 3))}, AS_IT_IS, "a.ply holds no point"),
        ({"coordinates": np.zeros((0, 3)), "source": ""}, AS_IT_IS, "the cloud holds no point"),
        ({"coordinates": np.zeros((50, 2))}, AS_IT_IS, r"coordinates must be \(n, 3\), got \(50, 2\)"),
        ({"coordinates": np.full((50, 3), 1e200)}, AS_IT_IS, r"a coordinate of 1e\+200 is none; .* up to 1e\+18"),
        ({"labels": np.arange(49)}, AS_IT_IS, r"labels must be \(50,\), one for each point, got \(49,\)"),
        ({}, replace(AS_IT_IS, reach=1e-9), "no point lies within reach=1e-09 of the centre .none.; give a larger"),
        (
            {},
            replace(AS_IT_IS, channels=("x", "y", "z", "intensty")),
            "a.ply: no channel 'intensty'; there are x, y, z, intensity; nearest: 'intensity'",
        ),
        (
            {"channels": {"red": np.zeros((50, 1), np.float32)}},
            replace(AS_IT_IS, channels=("x", "y", "z", "red")),
            r"red must be \(50,\), one for each point, got \(50, 1\)",
        ),
    ],
)
def test_clouds_that_cannot_be_prepared(fields: dict[str, Any], preparation: Preparation, match: str) -> None:
    with pytest.raises(DataError, match=match):
        prepared(cloud(**fields), preparation)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_points": 0}, "Preparation.num_points is 0; allowed: 1 or more"),
        ({"num_points": 10.0}, r"Preparation.num_points is 10.0; allowed: an integer, at most \d+ or None"),
        ({"centre": "middle"}, "Preparation.centre is 'middle'; allowed: 'mean' or 'median' or 'ground' or 'none'"),
        ({"scale": "cube"}, "Preparation.scale is 'cube'; allowed: 'sphere', 'none' or a length of more than 0"),
        ({"scale": 0.0}, "Preparation.scale is 0.0; allowed: 'sphere', 'none' or a length of more than 0"),
        ({"scale": float("nan")}, "Preparation.scale is nan; allowed: a string or a finite number"),
        ({"reach": -1.0}, "Preparation.reach is -1.0; allowed: more than 0, or None"),
        ({"channels": ("x", "z", "y")}, "Preparation.channels is .*; allowed: 'x', 'y', 'z', then others, each once"),
        ({"channels": ("x", "y", "z", "nx", "nx")}, "Preparation.channels is .*; allowed: .* each once"),
        ({"most_bad": 1.5}, "Preparation.most_bad is 1.5; allowed: 0 to 1"),
    ],
)
def test_a_preparation_checks_itself(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(PointPeftError, match=match):
        Preparation(**fields)


@pytest.mark.parametrize("scale", ["sphere", 2.5, 3])
def test_a_preparation_travels_as_json(scale: str | float) -> None:
    stated = Preparation(num_points=None, scale=scale, channels=["x", "y", "z", "red"])  # type: ignore[arg-type]
    assert from_json(json.loads(json.dumps(to_json(stated))), Preparation) == stated


def test_a_cloud_set_has_prepared_samples() -> None:
    entry = Entry(read=cloud, source="a.ply")
    dataset = CloudSet(entries=(entry,), task="segmentation", classes=tuple(map(str, range(50))))
    points, label, _ = dataset[0]
    assert points.shape == (1024, 3) and sorted(label[label != UNKNOWN].tolist()) == list(range(50))
    assert (label == UNKNOWN).sum() == 1024 - 50, "a copy has no label, so that it does not count again"
