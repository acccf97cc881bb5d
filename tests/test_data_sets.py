"""The field's sets, from small files of exactly their forms: splits, labels of points, and what is said of gaps."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from point_peft.data.cloud import Cloud, Entry
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.data.sets import SETS
from point_peft.data.sets.few_shot import convert_pickle, draw_few_shot
from point_peft.data.sets.pickles import read_pickle
from point_peft.data.sets.s3dis import read_room
from point_peft.data.sets.shapenetpart import CATEGORIES, CLASSES, PARTS
from point_peft.errors import DataError, PointPeftError

RAW = Preparation(num_points=None, centre="none", scale="none")
N = 12
SYNSETS = {name: f"0{number:07d}" for number, name in enumerate(CATEGORIES)}
FEW_SHOT = "5way_10shot/0.pkl"


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hdf5(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values


def text(path: Path, rows: Any, delimiter: str = " ") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, str):
        path.write_text(rows)
    else:
        np.savetxt(path, rows, delimiter=delimiter, fmt="%.6f")


def modelnet_hdf5(root: Path) -> None:
    folder = root / "modelnet40_ply_hdf5_2048"
    for name, m in (("train0", 3), ("train1", 2), ("test0", 2)):
        labels = np.arange(m, dtype=np.uint8)[:, None]
        hdf5(folder / f"ply_data_{name}.h5", data=numbers(m, N, 3, seed=m), label=labels, normal=numbers(m, N, 3))
    text(folder / "shape_names.txt", "airplane\nbathtub\nnight_stand\n")
    text(folder / "train_files.txt", "".join(f"data/modelnet40_ply_hdf5_2048/ply_data_train{k}.h5\n" for k in (1, 0)))


def modelnet_text(root: Path) -> None:
    folder = root / "modelnet40_normal_resampled"
    text(folder / "modelnet40_shape_names.txt", "airplane\nbathtub\nnight_stand\n")
    text(folder / "modelnet10_shape_names.txt", "bathtub\nnight_stand\n")
    for name, items in (("train", ["airplane_0001", "night_stand_0002"]), ("test", ["bathtub_0107"])):
        text(folder / f"modelnet40_{name}.txt", "\n".join(items) + "\n")
        text(folder / f"modelnet10_{name}.txt", items[-1])
        for item in items:
            text(folder / item.rpartition("_")[0] / f"{item}.txt", numbers(N, 6), ",")


def scanobjectnn(root: Path) -> None:
    mask = np.where(np.arange(N) < 4, -1, 7)[None].repeat(3, axis=0)
    for folder, end in (("main_split", ""), ("main_split_nobg", ""), ("main_split", "_augmentedrot_scale75")):
        for name, labels in (("training", [0, 14, 3]), ("test", [1, 2, 3])):
            fields = {} if "nobg" in folder else {"mask": mask}
            data = numbers(3, N, 3, seed=len(folder + end))
            hdf5(root / "h5_files" / folder / f"{name}_objectdataset{end}.h5", data=data, label=labels, **fields)
    shutil.copytree(root / "h5_files" / "main_split", root / "h5_files" / "split2")


def parts_of(name: str) -> list[int]:
    first = CLASSES.index(f"{name} 0")
    return list(range(first, first + PARTS[name]))


def shapenet_text(root: Path) -> None:
    folder = root / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    text(folder / "synsetoffset2category.txt", "".join(f"{name}\t{synset}\n" for name, synset in SYNSETS.items()))
    for split, name in (("train", "Airplane"), ("val", "Car"), ("test", "Table")):
        listed = folder / "train_test_split" / f"shuffled_{split}_file_list.json"
        text(listed, json.dumps([f"shape_data/{SYNSETS[name]}/a1"]))
        rows = np.concatenate([numbers(N, 6), np.resize(parts_of(name), N)[:, None]], axis=1)
        text(folder / SYNSETS[name] / "a1.txt", rows)


def shapenet_hdf5(root: Path) -> None:
    """Kinds and parts in another order than that of the text, as the files say which is which."""
    folder = root / "hdf5_data"
    kinds = list(reversed(CATEGORIES))
    text(folder / "all_object_categories.txt", "".join(f"{name}\t{SYNSETS[name]}\n" for name in kinds))
    pairs = [[SYNSETS[name], part + 1] for name in kinds for part in reversed(range(PARTS[name]))]
    text(folder / "overallid_to_catid_partid.json", json.dumps(pairs))
    for split, name in (("train", "Airplane"), ("val", "Car"), ("test", "Table")):
        own = np.resize(np.arange(PARTS[name]), N)
        pid = [pairs.index([SYNSETS[name], part + 1]) for part in own]
        label = np.array([[kinds.index(name)]])
        hdf5(folder / f"ply_data_{split}0.h5", data=numbers(1, N, 3), label=label, pid=np.array([pid]))


def s3dis(root: Path) -> None:
    for area, room in ((1, "office_1"), (2, "hall_1"), (5, "office_1")):
        for name, seed in (("chair_1", 1), ("ceiling_1", 2), ("stairs_1", 3)):
            rows = np.concatenate([20 + numbers(seed, 3), np.full((seed, 3), 51.0)], axis=1)
            text(root / f"Area_{area}" / room / "Annotations" / f"{name}.txt", rows)
        text(root / f"Area_{area}" / room / "Annotations" / "._chair_1.txt", "a system's file")


def few_shot(root: Path) -> None:
    task = {
        "train": [(numbers(N, 6, seed=k), k, f"name{k}") for k in range(3)],
        "test": [(numbers(N, 6, seed=10 + k).astype(np.float64), np.int64(k), 0) for k in (2, 0)],
    }
    (root / FEW_SHOT).parent.mkdir(parents=True)
    (root / FEW_SHOT).write_bytes(pickle.dumps(task))


WRITERS: dict[str, Callable[[Path], None]] = {
    "modelnet40": modelnet_hdf5,
    "modelnet40 text": modelnet_text,
    "scanobjectnn": scanobjectnn,
    "shapenetpart": shapenet_text,
    "shapenetpart hdf5": shapenet_hdf5,
    "s3dis": s3dis,
    "few_shot": few_shot,
}


def written(form: str, root: Path) -> Path:
    WRITERS[form](root)
    return root / FEW_SHOT if form == "few_shot" else root


def read(form: str, path: Path, **options: Any) -> CloudSet:
    return SETS[form.split()[0]].read(path, DataOptions(**{"preparation": RAW, **options}))


def labels_of(dataset: CloudSet) -> list[int | None]:
    return [entry.label for entry in dataset.entries]


@pytest.mark.parametrize("form", WRITERS)
def test_each_set_is_recognised_as_itself_only_and_is_read_whole(form: str, tmp_path: Path) -> None:
    path = written(form, tmp_path)
    assert [name for name, known in SETS.items() if known.recognises(path)] == [form.split()[0]]
    dataset = read(form, path)
    assert {"train", "test"} <= {entry.split for entry in dataset.entries} <= {"train", "val", "test"}
    assert dataset.checked() is dataset and sum(dataset.counts().values()) > 0
    assert {len(dataset[index].points) for index in range(len(dataset))} <= {N, 6}
    pickle.loads(pickle.dumps(dataset))  # for the processes of a loader
    assert not any(known.recognises(tmp_path / "elsewhere") for known in SETS.values())


@pytest.mark.parametrize("form", ["modelnet40", "modelnet40 text", "shapenetpart", "scanobjectnn", "shapenetpart hdf5"])
def test_the_folder_itself_is_recognised_like_the_one_that_holds_it(form: str, tmp_path: Path) -> None:
    path = written(form, tmp_path)
    (folder,) = (entry for entry in path.iterdir() if entry.is_dir())
    assert SETS[form.split()[0]].recognises(folder)
    assert labels_of(read(form, folder)) == labels_of(read(form, path))


def test_modelnet_in_hdf5(tmp_path: Path) -> None:
    dataset = read("modelnet40", written("modelnet40", tmp_path), preparation=with_channels("nx", "ny", "nz"))
    assert dataset.classes == ("airplane", "bathtub", "night_stand") and labels_of(dataset) == [0, 1, 0, 1, 2, 0, 1]
    assert [entry.split for entry in dataset.entries] == ["train"] * 5 + ["test"] * 2
    assert dataset.entries[3].source.endswith("ply_data_train0.h5[1]")
    expected = np.concatenate([numbers(3, N, 3, seed=3)[1], numbers(3, N, 3)[1]], axis=1)
    assert np.allclose(dataset[3].points, expected)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = written("modelnet40", tmp_path)
    file = path / H5 / "ply_data_test0.h5"
    before = read("modelnet40", path)[5].points
    hdf5(file, data=1 + numbers(2, N, 3, seed=2), label=[0, 1])
    os.utime(file, ns=(0, 0))
    assert torch.allclose(read("modelnet40", path)[5].points, before + 1)
    file.unlink()
    with pytest.raises(DataError, match="ply_data_test0.h5 is missing; it should hold data, normal"):
        read_lost(path, file)


def read_lost(path: Path, file: Path) -> None:
    """Read a cloud of a file that has gone since the set was opened."""
    hdf5(file, data=numbers(1, N, 3), label=[0])
    dataset = read("modelnet40", path)
    file.unlink()
    dataset[5]


def with_channels(*names: str) -> Preparation:
    return replace(RAW, channels=("x", "y", "z", *names))


def test_modelnet_as_text_and_its_ten_classes(tmp_path: Path) -> None:
    path = written("modelnet40 text", tmp_path)
    dataset = read("modelnet40", path, preparation=with_channels("nx", "ny", "nz"))
    assert labels_of(dataset) == [0, 2, 1] and torch.allclose(
        dataset[1].points, torch.from_numpy(numbers(N, 6)), atol=1e-6
    )
    ten = read("modelnet40", path, variant="modelnet10")
    assert ten.classes == ("bathtub", "night_stand") and labels_of(ten) == [1, 0]


def test_scanobjectnn_variants_and_its_mask(tmp_path: Path) -> None:
    path = written("scanobjectnn", tmp_path)
    dataset = read("scanobjectnn", path, preparation=with_channels("foreground"))
    assert len(dataset.classes) == 15 and labels_of(dataset) == [0, 14, 3, 1, 2, 3]
    assert "main_split/training_objectdataset_augmentedrot_scale75.h5[0]" in dataset.entries[0].source
    foreground = (torch.arange(N) >= 4).long()
    assert torch.equal(dataset[0].points[:, 3].long(), foreground)
    parts = read("scanobjectnn", path, variant="OBJ_BG", task="segmentation")
    assert parts.classes == ("background", "foreground") and torch.equal(parts[0].label, foreground)
    assert not torch.equal(parts[0].points, dataset[0].points[:, :3])
    assert "split2/test_objectdataset.h5[2]" in read("scanobjectnn", path, variant="split2/obj_bg").entries[5].source
    with pytest.raises(DataError, match=r"nobg/training_objectdataset.h5\[0\]: there is no mask, .* for segmentation"):
        read("scanobjectnn", path, variant="obj_only", task="segmentation")[0]


@pytest.mark.parametrize("form", ["shapenetpart", "shapenetpart hdf5"])
def test_both_forms_of_shapenet_number_kinds_and_parts_alike(form: str, tmp_path: Path) -> None:
    dataset = read(form, written(form, tmp_path))
    assert len(dataset.classes) == 50 and len(dataset.categories) == 16 and dataset.classes[49] == "Table 2"
    for index, (split, name) in enumerate((("train", "Airplane"), ("val", "Car"), ("test", "Table"))):
        points, label, category = dataset[index]
        assert dataset.entries[index].split == split and CATEGORIES[category] == name
        assert label.tolist() == np.resize(parts_of(name), N).tolist() and points.shape == (N, 3)
    kinds = read(form, tmp_path, task="classification")
    assert kinds.classes == CATEGORIES and [int(kinds[index].label) for index in range(3)] == [0, 3, 15]


def test_rooms_of_s3dis_and_their_areas(tmp_path: Path) -> None:
    path = written("s3dis", tmp_path)
    dataset = read("s3dis", path, preparation=with_channels("red"))
    assert [(entry.group, entry.split) for entry in dataset.entries] == [
        ("Area_1", "train"),
        ("Area_2", "train"),
        ("Area_5", "test"),
    ]
    points, label, _ = dataset[2]
    assert label.tolist() == [0, 0, 8, 12, 12, 12] and torch.allclose(points[:, 3], torch.tensor(0.2))
    room = read_room(path / "Area_5" / "office_1")
    assert room.labels is not None and np.allclose(room.coordinates[room.labels == 8], 20 + numbers(1, 3), atol=1e-6)
    other = read("s3dis", path, test_groups=["Area_1"])
    assert {entry.split for entry in other.entries} == {None}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    arrays = [
        numbers(4, 3),
        np.asfortranarray(numbers(4, 3)),
        numbers(4, 3)[::2],
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.array([True, False]),
        np.array(3.5),
    ]
    values = {"arrays": arrays, "more": (1, 2.5, "x", None, True, np.int64(7), np.float32(0.5))}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(values, protocol))
    again = read_pickle(tmp_path / "a.pkl")
    assert again["more"] == values["more"]
    for array, before in zip(again["arrays"], arrays, strict=True):
        assert np.array_equal(np.asarray(array), before) and np.asarray(array).dtype == before.dtype


class Hostile:
    """A pickle of it asks to run something."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([Hostile(os.system, "touch hacked")], "a.pkl cannot be .* arrays only: it asks for posix.system, which is"),
        (Hostile(eval, "1 / 0"), "it asks for builtins.eval, which is refused"),
        (Cloud(coordinates=np.zeros((1, 3))), "it asks for point_peft.data.cloud.Cloud, which is refused"),
        (np.array([{}, None]), "it holds values of the type object; only numbers are read"),
        (np.zeros(2, [("a", "f4")]), "only numbers are read"),
        (np.array(["a"]), "it holds values of the type <U1; only numbers are read"),
    ],
)
def test_pickles_that_ask_for_more_are_refused(
    value: Any, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=match):
        read_pickle(tmp_path / "a.pkl")
    assert not (tmp_path / "hacked").exists()


def test_cut_pickles_and_other_bytes_are_told(tmp_path: Path) -> None:
    whole = pickle.dumps({"train": [(numbers(2, 3), 0, "")], "test": []})
    for content in [*(whole[:end] for end in range(0, len(whole), 3)), b"not a pickle", b"\x80\x05N.", b"(lp0\n0."]:
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as a pickle of arrays only|should hold {'train'"):
            SETS["few_shot"].read(tmp_path / "a.pkl", DataOptions())


def test_few_shot_tasks_and_their_conversion(tmp_path: Path) -> None:
    path = written("few_shot", tmp_path)
    dataset = read("few_shot", path, preparation=with_channels("nx", "ny", "nz"))
    assert dataset.classes == ("0", "1", "2") and labels_of(dataset) == [0, 1, 2, 2, 0]
    assert [entry.split for entry in dataset.entries] == ["train"] * 3 + ["test"] * 2
    convert_pickle(path, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["points"], np.stack([dataset[index].points for index in range(5)]))
        assert arrays["labels"].tolist() == [0, 1, 2, 2, 0] and arrays["class_names"].tolist() == ["0", "1", "2"]
        assert arrays["split"].tolist() == ["train"] * 3 + ["test"] * 2


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ([], "should hold {'train': .*, but has no list 'train'"),
        ({"train": [], "test": 3}, "has no list 'test'"),
        ({"train": [3], "test": []}, r"0.pkl\[train\]\[0\] should be points and a label"),
        ({"train": [], "test": [(numbers(5, 4), 0, "")]}, r"\[test\]\[0\] has points \(5, 4\) and label 0"),
        ({"train": [(numbers(5, 3), -1, "")], "test": []}, r"has points \(5, 3\) and label -1"),
        ({"train": [(numbers(5, 3), 0), (numbers(6, 3), 0)], "test": []}, r"clouds \(5, 3\) and \(6, 3\); one array"),
    ],
)
def test_pickles_of_another_form_are_not_converted(task: Any, match: str, tmp_path: Path) -> None:
    (tmp_path / "0.pkl").write_bytes(pickle.dumps(task))
    with pytest.raises(DataError, match=match):
        convert_pickle(tmp_path / "0.pkl", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def many(splits: Sequence[Any] = (None,), groups: int = 0, m: int = 120) -> CloudSet:
    """Clouds of six classes, each of one point that lies at the number of the cloud."""

    def cloud(number: int) -> Callable[[], Cloud]:
        return lambda: Cloud(coordinates=np.full((1, 3), float(number)))

    entries = [
        Entry(
            read=cloud(number),
            source=str(number),
            label=number % 6 if number % 20 else None,
            split=splits[number // 6 % len(splits)],
            group=f"g{number // 6 % groups}" if groups else "",
        )
        for number in range(m)
    ]
    return CloudSet(entries=tuple(entries), task="classification", classes=tuple("abcdef"), preparation=RAW)


@pytest.mark.parametrize(("splits", "groups"), [((None,), 0), (("train", "val", "test"), 0), ((None,), 5)])
def test_drawn_tasks(splits: Sequence[Any], groups: int) -> None:
    dataset = many(splits, groups)
    before = [dataset[index].label for index in range(len(dataset))]
    support, query = draw_few_shot(dataset, 3, 2, 4, seed=1)
    assert (len(support), len(query)) == (6, 12) and support.classes == query.classes and len(support.classes) == 3
    assert support.counts() == dict.fromkeys(support.classes, 2) and query.counts() == dict.fromkeys(query.classes, 4)
    assert {entry.split for entry in support.entries} == {"train"} and {entry.split for entry in query.entries} == {
        "test"
    }
    for part in (support, query):
        for index, entry in enumerate(part.entries):
            number = int(entry.source)
            assert part.classes[int(part[index].label)] == "abcdef"[number % 6] and part[index].points[0, 0] == number
            assert len(splits) == 1 or dataset.entries[number].split == entry.split
    sources = [{entry.source for entry in part.entries} for part in (support, query)]
    assert not sources[0] & sources[1]
    assert not groups or not {e.group for e in support.entries} & {e.group for e in query.entries}
    again, other = draw_few_shot(dataset, 3, 2, 4, seed=1)[0], draw_few_shot(dataset, 3, 2, 4, seed=2)[0]
    assert again.entries == support.entries and other.entries != support.entries
    assert all(torch.equal(dataset[index].label, label) for index, label in enumerate(before))


def test_tasks_that_cannot_be_drawn() -> None:
    with pytest.raises(
        PointPeftError, match="0 of 6 classes have 99 clouds to train on .*, but ways is 2; ask for fewer"
    ):
        draw_few_shot(many(), 2, 99, 1, seed=0)
    with pytest.raises(PointPeftError, match="6 of 6 classes have 1 clouds .*, but ways is 7"):
        draw_few_shot(many(), 7, 1, 1, seed=0)
    with pytest.raises(PointPeftError, match="shots is 0; allowed: 1 or more"):
        draw_few_shot(many(), 2, 0, 1, seed=0)
    with pytest.raises(PointPeftError, match="this one is for segmentation"):
        draw_few_shot(replace(many(), task="segmentation"), 2, 1, 1, seed=0)


def removed(*places: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for place in places:
            shutil.rmtree(root / place) if (root / place).is_dir() else (root / place).unlink()

    return change


def replaced(place: str, rows: Any) -> Callable[[Path], None]:
    return lambda root: text(root / place, rows)


H5, RESAMPLED = "modelnet40_ply_hdf5_2048", "modelnet40_normal_resampled"
SHAPENET = "shapenetcore_partanno_segmentation_benchmark_v0_normal"
TRAIN_SCAN = "h5_files/main_split/training_objectdataset_augmentedrot_scale75.h5"


@pytest.mark.parametrize(
    ("form", "change", "match"),
    [
        (
            "modelnet40",
            removed(f"{H5}/shape_names.txt"),
            r"2048/shape_names.txt is missing; it should hold one class a line, and comes with ModelNet40 in HDF5 "
            r"\(https://shapenet.*\); nothing is downloaded",
        ),
        (
            "modelnet40",
            removed(f"{H5}/ply_data_train0.h5"),
            r"ply_data_train0.h5 is missing; it should hold data \(m, 2",
        ),
        ("modelnet40", removed(f"{H5}/ply_data_test0.h5"), "ply_data_test0.h5 is missing"),
        (
            "modelnet40",
            removed(H5),
            "holds neither ply_data_train.*, as .*https.*, nor modelnet40_train.txt, as .*https",
        ),
        ("modelnet40", replaced(f"{H5}/ply_data_test0.h5", "junk"), "ply_data_test0.h5 cannot be read as HDF5"),
        (
            "modelnet40",
            lambda root: hdf5(root / H5 / "ply_data_test0.h5", points=[0]),
            "ply_data_test0.h5 holds no label; there are points",
        ),
        (
            "modelnet40 text",
            removed(f"{RESAMPLED}/modelnet40_test.txt"),
            "modelnet40_test.txt is missing; .* chair_0001",
        ),
        ("modelnet40 text", removed(f"{RESAMPLED}/bathtub"), "bathtub/bathtub_0107.txt is missing; .* x,y,z,nx,ny,nz"),
        (
            "modelnet40 text",
            replaced(f"{RESAMPLED}/modelnet40_test.txt", "bath_tub_0107"),
            "modelnet40_test.txt: 'bath_tub' is none of the 3 classes; nearest: 'bathtub'",
        ),
        (
            "modelnet40 text",
            replaced(f"{RESAMPLED}/bathtub/bathtub_0107.txt", "1,2,3\n"),
            "bathtub_0107.txt should hold rows of x y z nx ny nz, but has 3 columns",
        ),
        (
            "modelnet40 text",
            replaced(f"{RESAMPLED}/bathtub/bathtub_0107.txt", "1,2,3,4,5,\x00\n"),
            "bathtub_0107.txt cannot be read as rows of x y z nx ny nz",
        ),
        (
            "modelnet40 text",
            lambda root: (root / RESAMPLED / "modelnet40_train.txt").write_bytes(b"\xff\xfe\xfa"),
            "modelnet40_train.txt cannot be read as text",
        ),
        (
            "scanobjectnn",
            removed(TRAIN_SCAN),
            "_scale75.h5 is missing; it should hold data .* mask .*hkust-vgd.github.io",
        ),
        ("scanobjectnn", removed("h5_files"), "holds no main_split/.*, which come with ScanObjectNN's h5_files.zip"),
        ("shapenetpart", removed(f"{SHAPENET}/train_test_split"), "shuffled_train_file_list.json is missing"),
        ("shapenetpart", removed(f"{SHAPENET}/{SYNSETS['Car']}"), f"{SYNSETS['Car']}/a1.txt is missing; .* nz part"),
        (
            "shapenetpart",
            removed(SHAPENET),
            "holds neither all_object_categories.txt, .* nor synsetoffset2category.txt",
        ),
        (
            "shapenetpart",
            replaced(f"{SHAPENET}/train_test_split/shuffled_val_file_list.json", "["),
            "shuffled_val_file_list.json cannot be read as JSON",
        ),
        (
            "shapenetpart",
            replaced(f"{SHAPENET}/train_test_split/shuffled_val_file_list.json", '["shape_data/77/a1"]'),
            "'shape_data/77/a1' is of none of the 16 synsets",
        ),
        (
            "shapenetpart",
            replaced(f"{SHAPENET}/{SYNSETS['Car']}/a1.txt", np.full((2, 7), 50.0)),
            "a1.txt: part 50 is none of the 50, 0 to 49",
        ),
        (
            "shapenetpart",
            replaced(f"{SHAPENET}/synsetoffset2category.txt", "Airplane 1\nBoat 2\n"),
            "should have a line like 'Airplane 02691156' for each of the 16 kinds, but has the line 'Boat 2'",
        ),
        (
            "shapenetpart hdf5",
            replaced("hdf5_data/all_object_categories.txt", "Airplane 1\n"),
            "all_object_categories.txt should have .* for each of the 16 kinds, but has only 1 lines",
        ),
        ("shapenetpart hdf5", removed("hdf5_data/overallid_to_catid_partid.json"), "partid.json is missing"),
        (
            "shapenetpart hdf5",
            replaced("hdf5_data/overallid_to_catid_partid.json", f'[["{SYNSETS["Bag"]}", 1]]'),
            "should number the 50 parts of Airplane, .*; it has {'Bag': 1}",
        ),
        ("shapenetpart hdf5", removed("hdf5_data/ply_data_val0.h5"), "ply_data_val0.h5 is missing; .* pid"),
        (
            "shapenetpart hdf5",
            lambda root: hdf5(root / "hdf5_data/ply_data_val0.h5", label=[[16]]),
            r"ply_data_val0.h5\[0\]: label 16 is none of the 16 kinds of objects",
        ),
        (
            "shapenetpart hdf5",
            lambda root: hdf5(root / "hdf5_data/ply_data_val0.h5", label=[[1]], data=numbers(1, N, 3)),
            r"ply_data_val0.h5\[0\]: there is no pid",
        ),
        (
            "shapenetpart hdf5",
            lambda root: hdf5(root / "hdf5_data/ply_data_val0.h5", label=[[1]], data=numbers(1, N, 3), pid=[[-1] * N]),
            "part -1 is none of the 50",
        ),
        (
            "s3dis",
            removed("Area_5"),
            r"Area_5 is missing, the area for tests; there are Area_1, Area_2: .* test_groups",
        ),
        ("s3dis", removed("Area_1", "Area_2", "Area_5"), "holds no Area_1/ROOM/Annotations, .* on request"),
        (
            "s3dis",
            replaced("Area_1/office_1/Annotations/chiar_2.txt", numbers(1, 6)),
            "chiar_2.txt: 'chiar' is none of the 13 classes; nearest: 'chair'",
        ),
        (
            "s3dis",
            replaced("Area_1/office_1/Annotations/chair_1.txt", "1 2 3 4 5 185\x1a7\n"),
            "chair_1.txt cannot be read",
        ),
        (
            "s3dis",
            lambda root: [file.unlink() for file in (root / "Area_1/office_1/Annotations").glob("[!.]*")],
            "office_1/Annotations holds no text; it should hold files like chair_1.txt",
        ),
        ("few_shot", removed(FEW_SHOT), "0.pkl is missing; it should hold .* Point-BERT's ModelNetFewshot"),
    ],
)
def test_gaps_are_told_by_path(form: str, change: Callable[[Path], Any], match: str, tmp_path: Path) -> None:
    path = written(form, tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=match):
        read(form, path).checked()


@pytest.mark.parametrize(
    ("form", "options", "match"),
    [
        ("modelnet40", {"task": "segmentation"}, "task is 'segmentation'; modelnet40 is a set for classification"),
        ("modelnet40", {"variant": "modelnet10"}, "is modelnet40 in HDF5, which has no modelnet10"),
        (
            "scanobjectnn",
            {"variant": "obj_bgg"},
            "variant is 'obj_bgg'; allowed for scanobjectnn: obj_bg, .*split4/.*; nearest: 'obj_bg'",
        ),
        ("s3dis", {"variant": "v2"}, "variant is 'v2'; allowed for s3dis: None"),
        ("s3dis", {"split_along": "x"}, "split_along is 'x', which says nothing for s3dis; leave it out"),
        ("few_shot", {"tile": 2.0}, "tile is 2.0, which says nothing for few_shot"),
    ],
)
def test_options_that_a_set_does_not_have(form: str, options: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        read(form, written(form, tmp_path), **options)
