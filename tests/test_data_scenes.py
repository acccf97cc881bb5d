"""Large scenes are cut so that every point is in exactly one piece, split with gaps, and put together again."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import laspy
import numpy as np
import numpy.typing as npt
import pytest

from point_peft.data.cloud import Cloud
from point_peft.data.opening import open_data
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.data.scenes import Scene, cut_scene, read_scene, read_scenes
from point_peft.errors import DataError

SHARED = Path(os.environ.get("POINT_PEFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
FAR = np.array([637_000.0, 850_000.0, 400.0])


def options(num_points: int | None = 32, **changes: Any) -> DataOptions:
    return DataOptions(**{"preparation": Preparation(num_points=num_points), **changes})


def scattered(n: int = 1000, seed: int = 0) -> npt.NDArray[np.float64]:
    """Points (n, 3) far from the origin, 100 long, 40 wide, and close together at one corner."""
    rng = np.random.default_rng(seed)
    points = rng.random((n, 3)) * [100, 40, 10]
    points[: n // 4] *= 0.05
    return FAR + np.round(points, 3)


def scene_file(path: Path, codes: list[int], n: int = 1000, seed: int = 0) -> Path:
    """A LAS file whose points have these codes, in turn."""
    header = laspy.LasHeader(point_format=6, version="1.4")
    header.offsets, header.scales = FAR, [0.001] * 3
    las = laspy.LasData(header)
    las.x, las.y, las.z = scattered(n, seed).T
    las.classification = np.resize(np.array(codes, np.uint8), n)
    las.intensity = np.arange(n)
    las.write(path)
    return path


def cut(points: npt.NDArray[np.float64], chosen: DataOptions, labels: npt.NDArray[np.int64] | None = None) -> Scene:
    cloud = Cloud(coordinates=points, labels=labels, source="scene.las")
    return cut_scene(cloud, "scene", chosen, np.random.default_rng(0))


@pytest.mark.parametrize("tile", [None, 1.0, 7.5, 1000.0])
@pytest.mark.parametrize("num_points", [1, 32, 5000])
def test_every_point_is_in_exactly_one_piece(tile: float | None, num_points: int) -> None:
    points = scattered()
    scene = cut(points, options(num_points, tile=tile))
    assert np.array_equal(np.sort(np.concatenate(scene.pieces)), np.arange(1000))
    assert max(map(len, scene.pieces)) <= num_points
    assert min(map(len, scene.pieces)) > 0
    assert (scene.dropped, set(scene.splits)) == (0, {None})
    if tile is not None:
        columns = np.floor((points - points.min(axis=0)) / tile)[:, :2]
        assert all(len(np.unique(columns[piece], axis=0)) == 1 for piece in scene.pieces)


def test_a_crowded_column_is_cut_at_random_into_pieces_of_one_size() -> None:
    points = scattered()
    scene = cut(points, options(300, tile=1000.0))
    assert [len(piece) for piece in scene.pieces] == [250] * 4
    # Each is a sample of the whole: 250 of the points, a quarter, are in the corner.
    shares = [(points[piece, 0] < FAR[0] + 5).mean() for piece in scene.pieces]
    assert shares == pytest.approx([0.29] * 4, abs=0.08)
    for piece, again in zip(scene.pieces, cut(points, options(300, tile=1000.0)).pieces, strict=True):
        np.testing.assert_array_equal(piece, again)
    assert len(cut(points, options(None, tile=1000.0)).pieces) == 1


def test_without_a_length_a_column_has_about_num_points_points() -> None:
    scene = cut(FAR + np.random.default_rng(0).random((4000, 3)) * [100, 40, 1], options(100))
    assert np.median([len(piece) for piece in scene.pieces]) == pytest.approx(75, abs=12)
    line = FAR + np.arange(64)[:, None] * [1, 0, 0]
    assert sum(map(len, cut(line, options(16)).pieces)) == 64
    assert [len(piece) for piece in cut(np.repeat(FAR[None], 64, axis=0), options(16)).pieces] == [16] * 4
    with pytest.raises(DataError, match="scene.las: without num_points the length of a tile is needed"):
        cut(line, options(None))


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_scene_is_split_along_an_axis_with_gaps(axis: str) -> None:
    points = scattered()
    scene = cut(points, options(split_along=axis, val_share=0.2, test_share=0.3, gap=2.0))
    place = points[:, "xy".index(axis)]
    rows = {
        split: [piece for piece, s in zip(scene.pieces, scene.splits, strict=True) if s == split]
        for split in ("train", "val", "test")
    }
    ends = {split: (place[np.concatenate(p)].min(), place[np.concatenate(p)].max()) for split, p in rows.items()}
    assert ends["val"][0] - ends["train"][1] >= 2
    assert ends["test"][0] - ends["val"][1] >= 2
    kept = {split: sum(map(len, pieces)) for split, pieces in rows.items()}
    assert scene.dropped == 1000 - sum(kept.values()) > 0
    assert kept["train"] == pytest.approx(500, abs=scene.dropped)
    assert kept["val"] == pytest.approx(200, abs=scene.dropped)
    whole = cut(points, options(split_along=axis, val_share=0, test_share=0.3))
    assert (whole.dropped, set(whole.splits)) == (0, {"train", "test"})
    with pytest.raises(
        DataError, match=f"scene.las: no point is left for (train|val) along {axis}, from .* with a gap of 90.0; choose"
    ):
        cut(points, options(split_along=axis, gap=90.0))


def test_points_that_lie_nowhere_are_counted_and_told() -> None:
    points = scattered()
    points[3], points[5] = np.nan, np.inf
    with pytest.warns(UserWarning, match="scene.las: 2 of 1000 points hold NaN or infinity and are in no piece"):
        scene = cut(points, options())
    assert (scene.dropped, sum(map(len, scene.pieces))) == (2, 998)
    with pytest.raises(DataError, match="scene.las: no point has finite coordinates"):
        cut(points[[3, 5]], options())


def test_predictions_of_pieces_become_those_of_the_scene() -> None:
    labels = np.random.default_rng(1).integers(0, 5, 1000)
    scene = cut(scattered(), options(), labels)

    def predictions() -> Any:
        rng = np.random.default_rng(2)
        for number in range(len(scene.pieces)):
            piece = scene.piece(number)
            assert piece.labels is not None
            n = len(piece.labels)
            # As a piece is prepared: all its points, then copies, for which a model may say something else.
            rows = np.concatenate([np.arange(n), rng.integers(n, size=32 - n)])
            yield number, rows, np.concatenate([piece.labels, np.full(32 - n, 9)])

    np.testing.assert_array_equal(scene.together(predictions()), labels)
    some = scene.together([next(predictions())])
    assert (some >= 0).sum() == len(scene.pieces[0])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_codes_become_classes_by_their_names(tmp_path: Path) -> None:
    path = scene_file(tmp_path / "a.las", [2, 6, 17])
    data = open_data(path, options())
    assert (data.task, data.classes) == ("segmentation", ("ground", "building", "bridge deck"))
    (scene,), _ = read_scenes([path], options())
    assert scene.cloud.labels is not None
    assert scene.cloud.labels[:6].tolist() == [0, 1, 2] * 2
    np.testing.assert_allclose(scene.cloud.coordinates, scattered(), rtol=0, atol=1e-6)
    piece, first = data.entries[0].read(), scene.pieces[0]
    assert piece.coordinates.dtype == np.float64
    np.testing.assert_array_equal(piece.coordinates, scene.cloud.coordinates[first])
    np.testing.assert_array_equal(piece.channels["intensity"], first)
    assert piece.source == f"{path}, piece 0"
    assert {(entry.split, entry.group) for entry in data.entries} == {(None, "a")}
    pickle.loads(pickle.dumps(data.entries[:3]))


def test_classes_may_be_merged_and_left_out(tmp_path: Path) -> None:
    path = scene_file(tmp_path / "a.las", [2, 6, 17, 20])
    assert open_data(path, options()).classes == ("2", "6", "17", "20")  # 20 has no name
    chosen = {"built": [17, 6], "ground": [2]}
    (scene,), classes = read_scenes([path], options(classes=chosen))
    assert scene.cloud.labels is not None
    assert (classes, scene.cloud.labels[:4].tolist()) == (("built", "ground"), [1, 0, 0, -1])
    with pytest.warns(UserWarning, match="no point is of class water; there are 2, 6, 17, 20"):
        open_data(path, options(classes={"water": [9], "ground": [2]}))
    with pytest.raises(DataError, match="no point has a code of the classes asked for; there are 2, 6, 17, 20"):
        open_data(path, options(classes={"water": [9]}))


def test_a_scene_of_text_may_have_labels_or_none(tmp_path: Path) -> None:
    columns = np.column_stack([scattered(), np.resize([4, 8], 1000)])
    np.savetxt(tmp_path / "a.txt", columns, header="x y z kind", fmt="%.10g")
    data = open_data(tmp_path / "a.txt", options(label_field="kind"))
    assert data.classes == ("4", "8")
    np.savetxt(tmp_path / "b.txt", columns[:, :3], fmt="%.10g")
    data = open_data(tmp_path / "b.txt", options())
    assert (data.classes, data.entries[0].read().labels) == ((), None)
    assert open_data(tmp_path / "b.txt", options(classes={"a": [1], "b": [2]})).classes == ("a", "b")


def test_several_scenes_are_split_by_file(tmp_path: Path) -> None:
    for number, codes in enumerate(([1, 2], [2, 6], [2], [2, 1])):
        scene_file(tmp_path / f"s{number}.las", codes, n=200, seed=number)
    named = options(kind="scene", val_groups=["s1"], test_groups=["s3"])
    for path in (tmp_path, sorted(tmp_path.iterdir())):
        data = open_data(path, named)
        assert data.classes == ("unclassified", "ground", "building")
        assert {(entry.group, entry.split) for entry in data.entries} == {
            ("s0", "train"),
            ("s1", "val"),
            ("s2", "train"),
            ("s3", "test"),
        }
    drawn = open_data(tmp_path, options(kind="scene"))
    assert {split for _, split in {(entry.group, entry.split) for entry in drawn.entries}} == {"train", "val", "test"}
    along = open_data(tmp_path, options(kind="scene", split_along="x"))
    assert len({(entry.group, entry.split) for entry in along.entries}) == 12
    scenes, _ = read_scenes(sorted(tmp_path.iterdir()), options())
    assert [scene.name for scene in scenes] == ["s0", "s1", "s2", "s3"]
    assert len(read_scene(sorted(tmp_path.iterdir()), options())) == sum(len(scene.pieces) for scene in scenes)


def test_bad_scenes_are_named(tmp_path: Path) -> None:
    path = scene_file(tmp_path / "a.las", [1], n=50)
    with pytest.raises(DataError, match="a file is named twice"):
        open_data([path, path], options())
    with pytest.raises(DataError, match="task is 'classification', but scenes are for segmentation"):
        open_data(path, options(task="classification"))
    with pytest.raises(DataError, match="no file is in the list; scenes are files of clouds"):
        open_data([], options())
    (tmp_path / "b.docx").write_text("")
    with pytest.raises(DataError, match="b.docx: no reader knows the suffix"):
        open_data(tmp_path, options(kind="scene"))


def test_an_airborne_scan_is_split_along_x_with_gaps_of_10_feet() -> None:
    path = SHARED / "autzen_trim.laz"
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"no {path}; set POINT_PEFT_DATA")
        pytest.skip(f"no {path}; set POINT_PEFT_DATA")
    chosen = options(1024, split_along="x", val_share=0.2, test_share=0.3, gap=10.0)
    (scene,), classes = read_scenes([path], chosen)
    assert classes == ("unclassified", "ground")
    points: Counter[str | None] = Counter()
    for piece, split in zip(scene.pieces, scene.splits, strict=True):
        points[split] += len(piece)
    assert (points, scene.dropped) == ({"train": 54476, "val": 21018, "test": 32580}, 1926)
    x = scene.cloud.coordinates[:, 0]
    assert (x.min(), x.max()) == (636001.76, 637179.22)
    assert scene.cloud.labels is not None
    assert np.bincount(scene.cloud.labels).tolist() == [83893, 26107]
    assert 0.9 < scene.cloud.channels["red"].max() <= 1
