"""Parts of ShapeNet: 16 kinds of objects, 50 parts, as HDF5 (2,048 points) or as text with normals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import Cloud, Entry, Split, Task
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.sets.files import (
    check_options,
    folder_with,
    hdf5_labels,
    hdf5_row,
    json_of,
    lines_of,
    needed,
    prepared_set,
    table_of,
)
from point_peft.errors import DataError, quoted

HDF5_ORIGIN = "ShapeNet's parts in HDF5 (https://shapenet.cs.stanford.edu/media/shapenet_part_seg_hdf5_data.zip)"
TEXT_FOLDER = "shapenetcore_partanno_segmentation_benchmark_v0_normal"
TEXT_ORIGIN = f"ShapeNet's parts with normals (https://shapenet.cs.stanford.edu/media/{TEXT_FOLDER}.zip)"
PARTS = {
    **{"Airplane": 4, "Bag": 2, "Cap": 2, "Car": 4, "Chair": 4, "Earphone": 3, "Guitar": 3, "Knife": 2},
    **{"Lamp": 4, "Laptop": 2, "Motorbike": 6, "Mug": 2, "Pistol": 3, "Rocket": 3, "Skateboard": 3, "Table": 3},
}
"""Kind of object -> how many parts it has; the parts of all kinds are numbered on, in this order."""
CATEGORIES = tuple(PARTS)
CLASSES = tuple(f"{name} {part}" for name, count in PARTS.items() for part in range(count))
NORMALS = ("nx", "ny", "nz")
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def recognises_shapenetpart(path: Path) -> bool:
    """True of the folders of either form, or one that holds it."""
    return _hdf5_folder(path) is not None or _text_folder(path) is not None


def read_shapenetpart(path: Path, options: DataOptions) -> CloudSet:
    """The objects with the official splits; each point is labelled with its part, each object has its kind's number.

    Both forms number the parts alike, 0 to 49. For the task classification the classes are the 16 kinds. Text has the
    channels nx, ny and nz.
    """
    check_options(options, "shapenetpart", tasks=["segmentation", "classification"], variants=())
    text, folder = _text_folder(path), _hdf5_folder(path)
    task: Task = options.task or "segmentation"
    if text is not None:
        entries = _text_entries(text)
    elif folder is not None:
        entries = _hdf5_entries(folder)
    else:
        raise DataError(
            f"{path} holds neither all_object_categories.txt, as {HDF5_ORIGIN} do, nor synsetoffset2category.txt, as "
            f"{TEXT_ORIGIN} do; nothing is downloaded"
        )
    classes = CLASSES if task == "segmentation" else CATEGORIES
    return prepared_set(entries, options, task=task, classes=classes, categories=CATEGORIES)


def _hdf5_folder(path: Path) -> Path | None:
    names = ["shapenet_part_seg_hdf5_data", "hdf5_data"]
    return folder_with(path, names, "all_object_categories.txt", "overallid_to_catid_partid.json")


def _text_folder(path: Path) -> Path | None:
    return folder_with(path, [TEXT_FOLDER], "synsetoffset2category.txt")


def _categories(path: Path) -> dict[str, str]:
    """Synset -> kind of object, in the order of the file."""
    pairs = [line.split() for line in lines_of(path)]
    wrong = [" ".join(pair) for pair in pairs if len(pair) != 2 or pair[0] not in PARTS]
    if wrong or {pair[0] for pair in pairs} != set(CATEGORIES):
        listed = f"the line {quoted(wrong[0])}" if wrong else f"only {len(pairs)} lines"
        raise DataError(
            f"{path} should have a line like 'Airplane 02691156' for each of the {len(PARTS)} kinds, but has {listed}"
        )
    return {synset: name for name, synset in pairs}


def _entry(read: Callable[[], Cloud], source: str, category: int, split: Split) -> Entry:
    return Entry(read=read, source=source, label=category, category=category, split=split)


def _hdf5_entries(folder: Path) -> Iterator[Entry]:
    kinds = _categories(needed(folder / "all_object_categories.txt", "the 16 kinds and their synsets", HDF5_ORIGIN))
    numbering = needed(folder / "overallid_to_catid_partid.json", "the synset and part of each number", HDF5_ORIGIN)
    parts = _part_numbers(json_of(numbering), kinds, numbering)
    numbers = [CATEGORIES.index(name) for name in kinds.values()]
    for split in SPLITS:
        for file in sorted(folder.glob(f"ply_data_{split}*.h5")) or [folder / f"ply_data_{split}0.h5"]:
            needed(file, "data (m, 2048, 3), label (m, 1) and pid (m, 2048)", HDF5_ORIGIN)
            for row, label in enumerate(hdf5_labels(file)):
                source = f"{file}[{row}]"
                if label not in range(len(numbers)):
                    raise DataError(f"{source}: label {label} is none of the {len(numbers)} kinds of objects")
                yield _entry(partial(_read_row, parts, file, row), source, numbers[label], split)


def _part_numbers(pairs: Sequence[Sequence[object]], kinds: Mapping[str, str], path: Path) -> tuple[int, ...]:
    """For each number of a part in the HDF5 files, its number among the 50: by kind, then by the part's own number."""
    own: dict[str, list[int]] = {}
    for synset, part in pairs:
        own.setdefault(kinds.get(str(synset), str(synset)), []).append(int(str(part)))
    counts = {name: len(set(numbers)) for name, numbers in own.items()}
    if len(pairs) != len(CLASSES) or counts != PARTS:
        raise DataError(f"{path} should number the {len(CLASSES)} parts of {', '.join(PARTS)}; it has {counts}")
    first = dict(zip(PARTS, np.cumsum([0, *PARTS.values()]).tolist(), strict=False))
    names = [kinds[str(synset)] for synset, _ in pairs]
    return tuple(
        first[name] + sorted(own[name]).index(int(str(part))) for name, (_, part) in zip(names, pairs, strict=True)
    )


def _read_row(parts: tuple[int, ...], path: Path, row: int) -> Cloud:
    arrays = hdf5_row(path, row, "data", "pid")
    source = f"{path}[{row}]"
    if "pid" not in arrays:
        raise DataError(f"{source}: there is no pid, the part of each point")
    numbers = arrays["pid"].reshape(-1).astype(np.int64)
    _check_parts(numbers, source)
    labels = np.asarray(parts, np.int64)[numbers]
    return Cloud(coordinates=arrays["data"].astype(np.float64), labels=labels, source=source)


def _text_entries(folder: Path) -> Iterator[Entry]:
    kinds = _categories(needed(folder / "synsetoffset2category.txt", "the 16 kinds and their synsets", TEXT_ORIGIN))
    for split in SPLITS:
        name = f"shuffled_{split}_file_list.json"
        listed = needed(folder / "train_test_split" / name, "names like shape_data/02691156/ID", TEXT_ORIGIN)
        for item in json_of(listed):
            synset, shape = Path(item).parts[-2:]
            if synset not in kinds:
                raise DataError(f"{listed}: {quoted(item)} is of none of the {len(kinds)} synsets")
            file = needed(folder / synset / f"{shape}.txt", "rows of x y z nx ny nz part", TEXT_ORIGIN)
            yield _entry(partial(_read_text, file), str(file), CATEGORIES.index(kinds[synset]), split)


def _read_text(path: Path) -> Cloud:
    table = table_of(path, ["x", "y", "z", *NORMALS, "part"])
    labels = table[:, 6].astype(np.int64)
    _check_parts(labels, str(path))
    channels = dict(zip(NORMALS, table[:, 3:6].T.astype(np.float32), strict=True))
    return Cloud(coordinates=table[:, :3], channels=channels, labels=labels, source=str(path))


def _check_parts(numbers: npt.NDArray[np.int64], source: str) -> None:
    wrong = numbers[(numbers < 0) | (numbers >= len(CLASSES))]
    if len(wrong):
        raise DataError(f"{source}: part {wrong[0]} is none of the {len(CLASSES)}, 0 to {len(CLASSES) - 1}")
