"""Folders, lists and arrays of clouds are recognised, read and split without dividing a group."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from point_peft.data.cloud import Entry
from point_peft.data.cloud_set import CloudSet
from point_peft.data.opening import open_data
from point_peft.data.options import DataOptions
from point_peft.data.splitting import check_splits, split_by_groups, split_by_options, split_named, with_validation
from point_peft.errors import DataError, PointPeftError

SHARED = Path(os.environ.get("POINT_PEFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
AS_IS = DataOptions(val_share=0, test_share=0)


def real(name: str) -> Path:
    """A file of real clouds; skip where it is absent, which in CI is a failure."""
    path = SHARED / name
    if not path.exists():
        reason = f"no {path}; set POINT_PEFT_DATA"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def cloud_file(path: Path, number: float = 0.0, labels: list[int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.full((4, 3), number) + np.arange(4)[:, None]
    if labels is None:
        np.save(path.with_suffix(".npy"), columns)
        return path.with_suffix(".npy")
    np.savez(path.with_suffix(".npz"), points=columns, labels=np.array(labels))
    return path.with_suffix(".npz")


def splits(data: CloudSet) -> dict[Any, list[tuple[str, int | None]]]:
    """Split -> the names of the files and their labels, in order."""
    found: dict[Any, list[tuple[str, int | None]]] = {}
    for entry in data.entries:
        found.setdefault(entry.split, []).append((Path(entry.source).stem, entry.label))
    return found


# ---- folders of classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "valid", "testing"), ("train", "validation", "test")]
)
def test_a_folder_of_splits_of_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for place, (split, count) in enumerate(zip(names, (2, 1, 1), strict=True)):
        for kind in ("tree", "car"):
            for number in range(count):
                cloud_file(tmp_path / split / kind / f"{kind}{place}{number}", number)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "names.txt").write_text("car tree")
    (tmp_path / names[0] / "tree" / ".hidden").write_text("")
    (tmp_path / names[0] / "tree" / "LICENSE.txt").write_text("free")
    data = open_data(tmp_path)
    assert (data.task, data.classes) == ("classification", ("car", "tree"))
    assert splits(data) == {
        "test": [("car20", 0), ("tree20", 1)],
        "train": [("car00", 0), ("car01", 0), ("tree00", 1), ("tree01", 1)],
        "val": [("car10", 0), ("tree10", 1)],
    }
    np.testing.assert_array_equal(data.part("train").entries[1].read().coordinates[:, 0], [1, 2, 3, 4])
    pickle.loads(pickle.dumps(data.entries))  # so that workers can be started anew


def test_a_folder_of_classes_is_split_by_shares_and_seed(tmp_path: Path) -> None:
    for kind in ("tree", "car"):
        for number in range(10):
            cloud_file(tmp_path / kind / f"{kind}{number}")
    data = open_data(str(tmp_path))
    assert Counter((entry.split, entry.label) for entry in data.entries) == {
        **dict.fromkeys([("train", 0), ("train", 1)], 7),
        **dict.fromkeys([("test", 0), ("test", 1)], 2),
        **dict.fromkeys([("val", 0), ("val", 1)], 1),
    }
    assert splits(data) == splits(open_data(tmp_path))
    assert splits(data) != splits(open_data(tmp_path, DataOptions(seed=1)))
    assert set(splits(open_data(tmp_path, AS_IS))) == {None}


def test_training_without_validation_gives_some_of_it(tmp_path: Path) -> None:
    for number in range(10):
        cloud_file(tmp_path / "train" / "car" / f"a{number}")
    cloud_file(tmp_path / "test" / "car" / "b")
    count = {split: len(found) for split, found in splits(open_data(tmp_path, DataOptions(val_share=0.3))).items()}
    assert count == {"train": 7, "val": 3, "test": 1}
    assert set(splits(open_data(tmp_path, DataOptions(val_share=0)))) == {"train", "test"}


def folder(tmp_path: Path, *files: str) -> Path:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1 2 3\n")
    return tmp_path


BAD_FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "strange": (
        ("car/a.txt", "car/b.docx", "car/c.zip"),
        r"car should hold files of clouds only .*, but has b.docx, c.zip",
    ),
    "many": (tuple(f"car/{i}.log" for i in range(5)), r"but has 0.log, 1.log, 2.log and 2 more"),
    "nested": (("car/train/a.txt", "car/b.txt"), r"car should hold files of clouds only .*, but has train"),
    "empty": (("car/a.txt", "tree/.keep"), r"tree is empty; a class should have at least one file"),
    "loose": (("car/a.txt", "b.ply"), r"b.ply and nothing that says its class; it should hold train/CLASS/FILES"),
    "extra": (("train/car/a.txt", "test/car/a.txt", "meta/car/a.txt"), r"meta is no split, beside folders of splits"),
    "twice": (("train/car/a.txt", "val/car/a.txt", "valid/car/a.txt"), r"valid is a second folder for val"),
    "untrained": (("val/car/a.txt", "test/car/a.txt"), r"has test and val, but no train"),
    "new": (("train/car/a.txt", "test/cat/a.txt"), r"class 'cat' is in test, but not in train; nearest there: 'car'"),
    "flat": (("a.txt",), r"has no folders of classes, .*; for scenes state kind scene"),
    "nothing": ((".git",), r"has no folders of classes"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_named_with_what_it_should_hold(tmp_path: Path, name: str) -> None:
    files, message = BAD_FOLDERS[name]
    with pytest.raises(DataError, match=message):
        open_data(folder(tmp_path, *files))


# ---- manifests -------------------------------------------------------------------------------------------------------


def manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        path.write_text("\n".join([",".join(names), *(",".join(str(row.get(n, "")) for n in names) for row in rows)]))
    return path


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_list_of_files_with_labels_splits_and_groups(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b", "c"):
        cloud_file(tmp_path / "clouds" / name, ord(name))
    rows = [
        {"file": "clouds/a.npy", "label": "tree", "split": "train", "group": "one"},
        {"file": "clouds/b.npy", "label": "car", "split": "train", "group": "one"},
        {"file": "clouds/c.npy", "label": "tree", "split": "test", "group": "two"},
    ]
    data = open_data(manifest(tmp_path / f"list.{suffix}", rows), DataOptions(val_share=0))
    assert (data.task, data.classes) == ("classification", ("car", "tree"))
    assert splits(data) == {"train": [("a", 1), ("b", 0)], "test": [("c", 1)]}
    assert [entry.group for entry in data.entries] == ["one", "one", "two"]
    assert data.entries[2].read().coordinates[0, 0] == ord("c")
    numbered = [{"file": row["file"], "label": label} for row, label in zip(rows, (10, 9, 10), strict=True)]
    data = open_data(manifest(tmp_path / f"numbers.{suffix}", numbered), AS_IS)
    assert (data.classes, [entry.label for entry in data.entries]) == (("9", "10"), [1, 0, 1])


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_list_without_labels_is_for_segmentation(tmp_path: Path, suffix: str) -> None:
    cloud_file(tmp_path / "a", labels=[5, 5, 7, 7])
    cloud_file(tmp_path / "b", labels=[9, 5, -1, 5])
    rows = [{"file": "a.npz", "category": "mug", "site": "n"}, {"file": "b.npz", "category": "cap", "site": "s"}]
    path = manifest(tmp_path / f"list.{suffix}", rows)
    data = open_data(path, DataOptions(group="site", train_groups=["n"], test_groups=["s"]))
    assert (data.task, data.classes, data.categories) == ("segmentation", ("5", "7", "9"), ("cap", "mug"))
    assert data.codes == ((5,), (7,), (9,))
    assert [(entry.split, entry.category, entry.label) for entry in data.entries] == [
        ("train", 1, None),
        ("test", 0, None),
    ]
    labels = [entry.read().labels for entry in data.entries]
    assert [values.tolist() for values in labels if values is not None] == [[0, 0, 1, 1], [2, 0, -1, 0]]
    merged = DataOptions(group="site", classes={"rest": [9, 7], "five": [5]}, val_share=0, test_share=0)
    data = open_data(path, merged)
    values = data.entries[1].read().labels
    assert values is not None
    assert (data.classes, values.tolist()) == (("rest", "five"), [0, 1, -1, 1])


BAD_ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "column": ([{"file": "a.npy", "lable": "x"}], r"(row 2|item 1): the column 'lable' is unknown; nearest: 'label'"),
    "missing": (
        [{"file": "a.npy"}, {"file": "c.npy"}],
        r"(row 3|item 2): .*c.npy does not exist; paths are relative to",
    ),
    "suffix": ([{"file": "a.foo"}], r"a.foo: no reader knows the suffix"),
    "unnamed": ([{"file": "a.npy", "label": "x"}, {"file": "", "label": "x"}], r"(row 3|item 2): no file is named"),
    "split": (
        [{"file": "a.npy", "split": "dev"}],
        r"(row 2|item 1): the split 'dev' is unknown; known: train, training, val",
    ),
    "some": (
        [{"file": "a.npy", "label": "x"}, {"file": "b.npy", "label": ""}],
        r"(row 3|item 2): it has no label, which others have",
    ),
    "part": ([{"file": "a.npy", "split": ""}, {"file": "b.npy", "split": "test"}], r"(row 2|item 1): it has no split"),
    "twice": ([{"file": "a.npy"}, {"file": "./a.npy"}], r"(row 3|item 2): ./a.npy stands in (row 2|item 1) already"),
    "straddling": (
        [
            {"file": "a.npy", "label": "x", "split": "train", "group": "g"},
            {"file": "b.npy", "label": "x", "split": "test", "group": "g"},
        ],
        r"group 'g' lies in train and in test",
    ),
}


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_number(tmp_path: Path, name: str, suffix: str) -> None:
    rows, message = BAD_ROWS[name]
    for file in ("a", "b"):
        cloud_file(tmp_path / file)
    with pytest.raises(DataError, match=message):
        open_data(manifest(tmp_path / f"list.{suffix}", rows), DataOptions(val_share=0))


def test_a_bad_list_is_named_with_what_it_should_hold(tmp_path: Path) -> None:
    cloud_file(tmp_path / "a")
    contents = {
        "empty.json": ("", r"empty.json cannot be read .*; it should hold a row for each file, with the columns file"),
        "object.json": ('{"file": "a.npy"}', r"it is no list"),
        "text.json": ('["a.npy"]', r"item 1 should be an object of texts and whole numbers, but is 'a.npy'"),
        "nested.json": ('[{"file": ["a.npy"]}]', r"item 1 should be an object of texts"),
        "none.json": ("[]", r"none.json has no rows; it should hold a row for each file"),
        "none.csv": ("file,label\n", r"none.csv has no rows"),
        "wide.csv": ("file,label\na.npy,x,y\n", r"row 2 has not the 2 columns of the first"),
        "narrow.csv": ("file,label\na.npy\n", r"row 2 has not the 2 columns of the first"),
        "double.csv": ("file,file\na.npy,a.npy\n", r"two columns have one name"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            open_data(tmp_path / name)
    path = manifest(tmp_path / "list.csv", [{"file": "a.npy", "label": "x"}])
    with pytest.raises(DataError, match="there is no column 'person' to group by"):
        open_data(path, DataOptions(group="person"))
    with pytest.raises(DataError, match="has labels of whole clouds; for segmentation the labels are in the files"):
        open_data(path, DataOptions(task="segmentation"))


# ---- files of arrays -------------------------------------------------------------------------------------------------


def array_set(path: Path, **arrays: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return path
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values if np.asarray(values).dtype.kind != "U" else np.asarray(values, object)
    return path


POINTS = np.arange(4 * 5 * 3, dtype=np.float32).reshape(4, 5, 3)


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_a_file_of_arrays_with_labels_of_clouds(tmp_path: Path, suffix: str) -> None:
    path = array_set(
        tmp_path / f"a.{suffix}",
        points=POINTS,
        labels=np.array([0, 1, 1, -1]),
        speed=np.arange(20.0).reshape(4, 5),
        normals=np.ones((4, 5, 3)),
        person=np.array(["ann", "bob", "bob", "eve"]),
        split=np.array(["train", "Training", "train", "testing"]),
        class_names=np.array(["up", "down"]),
    )
    data = open_data(path, DataOptions(group="person", val_share=0))
    assert (data.task, data.classes) == ("classification", ("up", "down"))
    found = [(entry.label, entry.group, entry.split) for entry in data.entries]
    assert found == [(0, "ann", "train"), (1, "bob", "train"), (1, "bob", "train"), (-1, "eve", "test")]
    cloud = data.entries[2].read()
    np.testing.assert_array_equal(cloud.coordinates, POINTS[2].astype(np.float64))
    assert cloud.coordinates.dtype == np.float64
    assert {name: values[1] for name, values in cloud.channels.items()} == {"speed": 11, "nx": 1, "ny": 1, "nz": 1}
    assert cloud.labels is None
    assert cloud.source == f"{path}[2]"


@pytest.mark.parametrize("suffix", ["npz", "h5"])
def test_a_file_of_arrays_with_labels_of_points(tmp_path: Path, suffix: str) -> None:
    labels = np.arange(20).reshape(4, 5) % 3
    path = array_set(tmp_path / f"a.{suffix}", xyz=POINTS, seg=labels, split=np.array([0, 0, 1, 1]))
    data = open_data(path, DataOptions(label_field="seg", val_share=0))
    assert (data.task, data.classes) == ("segmentation", ("0", "1", "2"))
    assert [(entry.label, entry.split) for entry in data.entries] == [(None, "train")] * 2 + [(None, "test")] * 2
    values = data.entries[1].read().labels
    assert values is not None
    assert values.tolist() == labels[1].tolist()


def test_labels_of_arrays_may_be_names(tmp_path: Path) -> None:
    names = np.array(["up", "down", "up", "left"])
    data = open_data(array_set(tmp_path / "a.npz", points=POINTS, label=names), AS_IS)
    assert (data.classes, [entry.label for entry in data.entries]) == (("down", "left", "up"), [2, 0, 2, 1])
    path = array_set(tmp_path / "b.npz", points=POINTS, label=names, class_names=np.array(["up", "left", "down"]))
    assert [entry.label for entry in open_data(path, AS_IS).entries] == [0, 2, 0, 1]


BAD_ARRAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "four": (
        {"points": np.zeros((4, 5, 4))},
        {},
        r"points is float64 \(4, 5, 4\); it should be numbers \(clouds, points, 3\)",
    ),
    "none": ({"points": np.zeros((0, 5, 3))}, {}, r"points is float64 \(0, 5, 3\)"),
    "short": (
        {"label": np.zeros(3, int)},
        {},
        r"label is \(3,\); it should have one label a cloud, \(4,\), or a point, \(4, 5\)",
    ),
    "high": (
        {"label": np.array([0, 1, 2, 3]), "class_names": np.array(["a", "b"])},
        {},
        r"label goes from 0 to 3; it should be 0 to 1",
    ),
    "low": ({"label": np.array([0, 1, -2, 3])}, {}, r"label goes from -2 to 3"),
    "real": ({"label": np.array([0, 1, 0.5, 1])}, {}, r"label should hold whole numbers, the labels, but has 0.5"),
    "stranger": (
        {"label": np.array(["a", "b", "c", "a"]), "class_names": np.array(["a", "b"])},
        {},
        r"label has 'c', which is none of class_names",
    ),
    "two": ({"label": np.zeros(4, int), "labels": np.zeros(4, int)}, {}, r"the arrays label and labels may be labels"),
    "field": ({"gt": np.zeros(4, int)}, {"label_field": "gtt"}, r"has no array 'gtt' for labels; nearest: 'gt'"),
    "split": (
        {"split": np.array([0, 1, 2, 0])},
        {},
        r"split has '2'; it should be 0 for training, 1 for test, or one of train",
    ),
    "group": (
        {"person": np.zeros(4, int)},
        {"group": "people"},
        r"has no array 'people' of one value a cloud; there are person",
    ),
    "task": (
        {"label": np.zeros(4, int)},
        {"task": "segmentation"},
        r"the labels are of clouds or absent, which is classification",
    ),
    "straddling": (
        {"g": np.array([1, 1, 2, 2]), "split": np.array([0, 1, 0, 1])},
        {"group": "g", "val_share": 0},
        r"group '1' lies in train and in test",
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_of_a_set_are_named(tmp_path: Path, name: str) -> None:
    arrays, options, message = BAD_ARRAYS[name]
    with pytest.raises(DataError, match=message):
        open_data(array_set(tmp_path / f"{name}.npz", **{"points": POINTS, **arrays}), DataOptions(**options))


def test_recordings_of_people_are_split_by_person() -> None:
    named = DataOptions(group="subject", train_groups=("1", "2"), val_groups=("3",), test_groups=("4",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_data(real("mars.npz"), named)
    assert Counter((entry.split, entry.group) for entry in data.entries) == {
        ("train", "1"): 777,
        ("train", "2"): 763,
        ("val", "3"): 577,
        ("test", "4"): 499,
    }
    assert len(data.classes) == 10
    cloud = data.entries[0].read()
    assert cloud.coordinates.shape == (1024, 3)
    assert set(cloud.channels) == {"velocity", "intensity"}
    with pytest.warns(UserWarning, match="the split val has no cloud of 'right limb extension'"):
        drawn = open_data(real("mars.npz"), DataOptions(group="subject"))
    assert sorted(Counter((entry.split, entry.group) for entry in drawn.entries).values()) == [499, 577, 763, 777]
    with pytest.raises(DataError, match="val: no group is called '5'; nearest: .*; there are '1', '2', '3', '4'"):
        open_data(real("mars.npz"), DataOptions(group="subject", val_groups=("5",)))


# ---- splits ----------------------------------------------------------------------------------------------------------


def entries(*rows: tuple[str, int | None], split: Any = None) -> tuple[Entry, ...]:
    def unread() -> Any:
        raise AssertionError("splitting reads no cloud")

    return tuple(
        Entry(read=unread, source=f"{i}", group=g, label=label, split=split) for i, (g, label) in enumerate(rows)
    )


def test_whole_groups_are_split_and_each_class_by_its_share() -> None:
    rng = np.random.default_rng(0)
    rows = [(f"g{g}", int(label)) for g in range(60) for label in rng.integers(0, 4, rng.integers(1, 12))]
    for seed in range(5):
        found = split_by_groups(entries(*rows), val=0.15, test=0.25, seed=seed)
        of_group: dict[str, set[Any]] = {}
        for entry in found:
            of_group.setdefault(entry.group, set()).add(entry.split)
        assert all(len(some) == 1 for some in of_group.values())
        for label in range(4):
            counts = Counter(entry.split for entry in found if entry.label == label)
            shares: dict[Any, float] = {"train": 0.6, "val": 0.15, "test": 0.25}
            for split, share in shares.items():
                assert counts[split] / sum(counts.values()) == pytest.approx(share, abs=0.06)
        assert [entry.source for entry in found] == [entry.source for entry in entries(*rows)]


def test_no_split_is_empty_and_too_few_groups_are_an_error() -> None:
    big = entries(*[("big", 0)] * 98, ("a", 0), ("b", 0))
    found = {entry.group: entry.split for entry in split_by_groups(big, val=0.01, test=0.01)}
    assert set(found.values()) == {"train", "val", "test"}
    with pytest.raises(DataError, match="too few groups for a split into train, val, test, .* no more than 2;"):
        split_by_groups(big[1:99])
    assert {entry.split for entry in split_by_groups(big[1:99], val=0)} == {"train", "test"}


def test_validation_is_taken_from_training_by_whole_groups() -> None:
    both = entries(*[(g, n % 2) for g in "abcde" for n in range(4)], split="train") + entries(("t", 0), split="test")
    found = with_validation(both, 0.2, seed=3)
    assert Counter(entry.split for entry in found) == {"train": 16, "val": 4, "test": 1}
    assert len({entry.group for entry in found if entry.split == "val"}) == 1
    with pytest.raises(DataError, match="have a validation split already"):
        with_validation(found)
    with pytest.raises(DataError, match="no entry is for training"):
        with_validation(both[-1:])
    with pytest.raises(DataError, match="too few groups for a split into train, val, .*: there is no more than 1;"):
        with_validation(both[:4])


def test_a_group_in_training_and_test_is_told_before_validation_is_taken() -> None:
    leak = entries(("a", 0), split="train") + entries(("a", 0), split="test")
    more = entries(*[(g, 0) for g in "abc"], split="train") + entries(("a", 0), split="test")
    for seed, both in ((0, leak), *((seed, more) for seed in range(5))):  # of three, 'a' may be drawn for validation
        with pytest.raises(DataError, match="group 'a' lies in train and in test .* test what has been trained on"):
            split_by_options(both, DataOptions(val_share=0.3, seed=seed))


def test_groups_may_be_named() -> None:
    some = entries(("a", 0), ("b", 0), ("b", 1), ("c", 0))
    found = split_named(some, val=["b"], test=["c"])
    assert [entry.split for entry in found] == ["train", "val", "val", "test"]
    with pytest.raises(DataError, match="the groups 'a' are in no split; name them, or leave out train"):
        split_named(some, train=["b"], test=["c"])
    with pytest.raises(DataError, match="group 'b' is in train and in test; name it once"):
        split_named(some, train=["a", "b"], test=["b", "c"])
    with pytest.raises(DataError, match="all groups are in val or test, so nothing is left to train on"):
        split_named(some, val=["a", "b"], test=["c"])
    with pytest.raises(DataError, match="the entries have no groups to split by; name the column"):
        split_named(entries(("", 0)), test=["a"])


def test_missing_classes_are_a_warning_and_divided_groups_an_error() -> None:
    train, val = entries(("a", 0), ("a", 1), split="train"), entries(("b", 0), split="val")
    with pytest.warns(UserWarning, match="the split val has no cloud of 'dog'"):
        check_splits(train + val, ("cat", "dog"))
    with pytest.warns(UserWarning, match="the split train has no cloud of 'dog'"):
        check_splits(train[:1] + entries(("c", 1), split="test"), ("cat", "dog"))
    with pytest.raises(DataError, match="group 'a' lies in train and in val"):
        check_splits(train + entries(("a", 0), ("a", 1), split="val"), ("cat", "dog"))
    with pytest.raises(DataError, match="some entries state a split and others none"):
        split_by_options(train + entries(("c", 0)), DataOptions())


# ---- the door --------------------------------------------------------------------------------------------------------


def test_what_is_not_recognised_is_named_with_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"none does not exist; it should be a folder of classes, a manifest .*, or one of the sets"
    ):
        open_data(tmp_path / "none")
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(DataError, match="a.docx: no reader knows the suffix '.docx'"):
        open_data(tmp_path / "a.docx")
    path = array_set(tmp_path / "a.npz", points=POINTS)
    with pytest.raises(DataError, match="kind 'array' is unknown; nearest: 'arrays'; known: auto, scene, folder"):
        open_data(path, DataOptions(kind="array"))
    with pytest.raises(DataError, match="a.npz is a file; data of kind folder are a folder of classes"):
        open_data(path, DataOptions(kind="folder"))
    with pytest.raises(DataError, match="is a folder; data of kind manifest are one file"):
        open_data(tmp_path, DataOptions(kind="manifest"))
    with pytest.raises(DataError, match="data of kind arrays are one path, not 2; only scenes are several"):
        open_data([path, path], DataOptions(kind="arrays"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("folder", {"group": "a"}),
        ("manifest", {"tile": 2.0}),
        ("arrays", {"classes": {"a": [1]}}),
        ("scene", {"variant": "b"}),
    ],
)
def test_an_option_that_says_nothing_is_refused(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=f"{next(iter(options))} is .*, which says nothing for data of kind {kind}; leave it out"
    ):
        open_data(tmp_path, DataOptions(kind=kind, **options))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("task", "detection", "'classification' or 'segmentation' or None"),
        ("val_share", 1.0, "0 or more and less than 1"),
        ("test_share", 0.9, "less than 1 together with val_share"),
        ("split_along", "z", "'x', 'y' or None"),
        ("gap", 1.0, "0 where split_along is None"),
        ("gap", -1.0, "0 or more"),
        ("tile", 0.0, "more than 0"),
        ("classes", {}, "one code or more for each class"),
        ("classes", {"a": []}, "one code or more for each class"),
        ("classes", {"a": [1], "b": [1, 2]}, "one code or more for each class, each in one class"),
        ("classes", {"a": "1"}, "a mapping of a string to a list of an integer"),
        ("test_groups", ["a", "a"], "groups that are named once"),
        ("seed", -1, "0 or more"),
        ("num_samples", 0, "1 or more"),
    ],
)
def test_options_say_what_they_allow(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(PointPeftError, match=rf"DataOptions.{field} is .*; allowed: .*{re.escape(allowed)}"):
        DataOptions(**{"val_share": 0.2, field: value})
