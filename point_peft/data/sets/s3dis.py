"""S3DIS: rooms of six areas of buildings, with colours; each point is of one of 13 classes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from point_peft.data.cloud import Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.sets.files import check_options, class_number, folder_with, prepared_set, table_of
from point_peft.errors import DataError

FOLDER = "Stanford3dDataset_v1.2_Aligned_Version"
ORIGIN = f"S3DIS's {FOLDER}.zip (http://buildingparser.stanford.edu/dataset.html)"
CLASSES = (
    *("ceiling", "floor", "wall", "beam", "column", "window", "door", "table", "chair", "sofa", "bookcase", "board"),
    "clutter",
)
CLUTTER = ("stairs", "staris")
"""Names in some files that count as clutter, by the field's custom."""
COLOURS = ("red", "green", "blue")
TEST_AREA = "Area_5"


def recognises_s3dis(path: Path) -> bool:
    """True of the folder in which Area_1 to Area_6 lie, or one that holds it."""
    return _folder(path) is not None


def read_s3dis(path: Path, options: DataOptions) -> CloudSet:
    """The rooms, whole, in groups by area; where no groups are named, Area_5 is for tests, all others for training."""
    check_options(options, "s3dis", "tile", tasks=["segmentation"], variants=())
    folder = _folder(path)
    if folder is None:
        raise DataError(
            f"{path} holds no Area_1/ROOM/Annotations, which come with {ORIGIN}, on request; nothing is downloaded"
        )
    rooms = sorted(room.parent for room in folder.glob("Area_*/*/Annotations"))
    areas = sorted({room.parent.name for room in rooms})
    if not options.names_groups and TEST_AREA not in areas:
        raise DataError(
            f"{folder / TEST_AREA} is missing, the area for tests; there are {', '.join(areas)}: get it with {ORIGIN}, "
            "or name other areas in test_groups"
        )
    return prepared_set(_entries(rooms, options), options, task="segmentation", classes=CLASSES)


def _folder(path: Path) -> Path | None:
    return folder_with(path, [FOLDER], "Area_*/*/Annotations")


def _entries(rooms: list[Path], options: DataOptions) -> Iterator[Entry]:
    for room in rooms:
        area = room.parent.name
        custom: Split = "test" if area == TEST_AREA else "train"
        split = None if options.names_groups else custom
        yield Entry(read=partial(read_room, room), source=str(room), group=area, split=split)


def read_room(path: Path) -> Cloud:
    """One room, `Area_k/ROOM`, as a cloud: the points of all files in its `Annotations`, in metres, with colours.

    Each file, such as `chair_3.txt`, is one thing of one class.
    """
    files = sorted(file for file in (path / "Annotations").glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise DataError(f"{path / 'Annotations'} holds no text; it should hold files like chair_1.txt, with {ORIGIN}")
    numbers = [_number(file) for file in files]
    tables = [table_of(file, ["x", "y", "z", *COLOURS]) for file in files]
    table = np.concatenate(tables)
    return Cloud(
        coordinates=table[:, :3],
        channels=dict(zip(COLOURS, (table[:, 3:].T / 255).astype(np.float32), strict=True)),
        labels=np.repeat(np.asarray(numbers, np.int64), [len(table) for table in tables]),
        source=str(path),
    )


def _number(file: Path) -> int:
    name = file.stem.split("_")[0]
    return class_number(CLASSES[-1] if name in CLUTTER else name, CLASSES, file)
