"""ModelNet40 and ModelNet10: objects of CAD models, as HDF5 (2,048 points) or as text with normals (10,000 points)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from point_peft.data.cloud import Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.sets.files import (
    check_options,
    class_number,
    folder_with,
    hdf5_labels,
    hdf5_row,
    lines_of,
    needed,
    prepared_set,
    table_of,
)
from point_peft.errors import DataError

HDF5_ORIGIN = "ModelNet40 in HDF5 (https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip)"
TEXT_ORIGIN = "ModelNet40 with normals (https://shapenet.cs.stanford.edu/media/modelnet40_normal_resampled.zip)"
VARIANTS = ("modelnet40", "modelnet10")
NORMALS = ("nx", "ny", "nz")
SPLITS: tuple[Split, ...] = ("train", "test")


def recognises_modelnet(path: Path) -> bool:
    """True of the folder `modelnet40_ply_hdf5_2048` or `modelnet40_normal_resampled`, or one that holds it."""
    return _hdf5_folder(path) is not None or _text_folder(path) is not None


def read_modelnet(path: Path, options: DataOptions) -> CloudSet:
    """The objects with the official training and test splits.

    Where there is text, `options.variant` "modelnet10" takes the ten classes of that set; there, and in HDF5 that has
    them, nx, ny and nz are channels. Raises `DataError` for what is missing, with its path.
    """
    check_options(options, "modelnet40", tasks=["classification"], variants=VARIANTS)
    name = (options.variant or VARIANTS[0]).lower()
    text = _text_folder(path)
    folder = text or _hdf5_folder(path)
    if folder is None:
        raise DataError(
            f"{path} holds neither ply_data_train*.h5, as {HDF5_ORIGIN} does, nor modelnet40_train.txt, as "
            f"{TEXT_ORIGIN} does; nothing is downloaded"
        )
    if text is None and name != VARIANTS[0]:
        raise DataError(f"{folder} is modelnet40 in HDF5, which has no {name}; the text files with normals have it")
    names = f"{name}_shape_names.txt" if text else "shape_names.txt"
    classes = tuple(lines_of(needed(folder / names, "one class a line", TEXT_ORIGIN if text else HDF5_ORIGIN)))
    entries = _text_entries(folder, name, classes) if text else _hdf5_entries(folder)
    return prepared_set(entries, options, task="classification", classes=classes)


def _hdf5_folder(path: Path) -> Path | None:
    folder = folder_with(path, ["modelnet40_ply_hdf5_2048"], "ply_data_*.h5")
    # The parts of ShapeNet lie in files of the same names.
    return None if folder is None or (folder / "all_object_categories.txt").exists() else folder


def _text_folder(path: Path) -> Path | None:
    return folder_with(path, ["modelnet40_normal_resampled"], "modelnet?0_train.txt", "modelnet?0_shape_names.txt")


def _hdf5_entries(folder: Path) -> Iterator[Entry]:
    for split in SPLITS:
        listed = folder / f"{split}_files.txt"
        names = [Path(line).name for line in lines_of(listed)] if listed.exists() else []
        files = [folder / name for name in names] or sorted(folder.glob(f"ply_data_{split}*.h5"))
        for file in files or [folder / f"ply_data_{split}0.h5"]:
            needed(file, "data (m, 2048, 3) and label (m, 1)", HDF5_ORIGIN)
            for row, label in enumerate(hdf5_labels(file)):
                yield Entry(read=partial(_read_row, file, row), source=f"{file}[{row}]", label=label, split=split)


def _read_row(path: Path, row: int) -> Cloud:
    arrays = hdf5_row(path, row, "data", "normal")
    normals = arrays["normal"].T.astype("float32") if "normal" in arrays else ()
    return Cloud(
        coordinates=arrays["data"].astype("float64"),
        channels=dict(zip(NORMALS, normals, strict=False)),
        source=f"{path}[{row}]",
    )


def _text_entries(folder: Path, name: str, classes: tuple[str, ...]) -> Iterator[Entry]:
    for split in SPLITS:
        listed = needed(folder / f"{name}_{split}.txt", "one object a line, as chair_0001", TEXT_ORIGIN)
        for item in lines_of(listed):
            kind = item.rpartition("_")[0]
            label = class_number(kind, classes, listed)
            file = needed(folder / kind / f"{item}.txt", "rows of x,y,z,nx,ny,nz", TEXT_ORIGIN)
            yield Entry(read=partial(_read_text, file), source=str(file), label=label, split=split)


def _read_text(path: Path) -> Cloud:
    table = table_of(path, ["x", "y", "z", *NORMALS], ",")
    channels = dict(zip(NORMALS, table[:, 3:].T.astype("float32"), strict=True))
    return Cloud(coordinates=table[:, :3], channels=channels, source=str(path))
