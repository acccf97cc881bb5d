"""ScanObjectNN: scanned objects of 15 classes with and without background, in HDF5 (2,048 points)."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from point_peft.data.cloud import Cloud, Entry, Split, Task
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.sets.files import check_options, folder_with, hdf5_labels, hdf5_row, needed, prepared_set
from point_peft.errors import DataError

ORIGIN = "ScanObjectNN's h5_files.zip (https://hkust-vgd.github.io/scanobjectnn)"
CLASSES = (
    *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink"),
    *("sofa", "toilet"),
)
PERTURBATIONS = {
    "pb_t25": "_augmented25_norot",
    "pb_t25_r": "_augmented25rot",
    "pb_t50_r": "_augmentedrot",
    "pb_t50_rs": "_augmentedrot_scale75",
}
FILES: Mapping[str, tuple[str, str]] = {
    "obj_bg": ("", ""),
    "obj_only": ("_nobg", ""),
    **{name: ("", end) for name, end in PERTURBATIONS.items()},
    **{f"{name}_nobg": ("_nobg", end) for name, end in PERTURBATIONS.items()},
}
"""Variant -> the ends of the names of the folder and of the files."""
VARIANTS: Mapping[str, tuple[str, str]] = {
    **{name: (f"main_split{folder}", file) for name, (folder, file) in FILES.items()},
    **{f"split{k}/{name}": (f"split{k}{folder}", file) for k in range(1, 5) for name, (folder, file) in FILES.items()},
}
"""Variant, of the main split or one of four others -> the folder and the end of the names of the files."""
HARDEST = "pb_t50_rs"
SPLITS: Mapping[str, Split] = {"training": "train", "test": "test"}


def recognises_scanobjectnn(path: Path) -> bool:
    """True of the folder `h5_files`, in which `main_split` and others lie, or one that holds it."""
    return _folder(path) is not None


def read_scanobjectnn(path: Path, options: DataOptions) -> CloudSet:
    """The objects of one variant with the official training and test splits.

    `options.variant` is "obj_bg", "obj_only" (no background) or a perturbation "pb_t25", "pb_t25_r", "pb_t50_r",
    "pb_t50_rs", which may end in "_nobg"; None means "pb_t50_rs", the hardest. "split1/obj_bg" to "split4/obj_bg" and
    so on are those of the other splits. For classification the channel "foreground" is 0 or 1, where the file has a
    mask; for segmentation points are labelled background or foreground. The files do not say which perturbed clouds are
    of one object, so that a part taken out of the training for validation holds objects that are trained on.
    """
    check_options(options, "scanobjectnn", tasks=["classification", "segmentation"], variants=list(VARIANTS))
    folder = _folder(path)
    if folder is None:
        raise DataError(f"{path} holds no main_split/*_objectdataset*.h5, which come with {ORIGIN}; none is downloaded")
    split, end = VARIANTS[(options.variant or HARDEST).lower()]
    task: Task = options.task or "classification"
    files = {meant: folder / split / f"{name}_objectdataset{end}.h5" for name, meant in SPLITS.items()}
    classes = CLASSES if task == "classification" else ("background", "foreground")
    return prepared_set(_entries(files, task), options, task=task, classes=classes)


def _folder(path: Path) -> Path | None:
    return folder_with(path, ["h5_files"], "main_split*/*_objectdataset*.h5", "split?*/*_objectdataset*.h5")


def _entries(files: Mapping[Split, Path], task: Task) -> Iterator[Entry]:
    for split, file in files.items():
        needed(file, "data (m, 2048, 3), label (m,) and mask (m, 2048)", ORIGIN)
        labelled = task == "segmentation"
        for row, label in enumerate(hdf5_labels(file)):
            read = partial(_read_row, file, row, labelled)
            yield Entry(read=read, source=f"{file}[{row}]", label=None if labelled else label, split=split)


def _read_row(path: Path, row: int, labelled: bool) -> Cloud:
    arrays = hdf5_row(path, row, "data", "mask")
    source = f"{path}[{row}]"
    if labelled and "mask" not in arrays:
        raise DataError(f"{source}: there is no mask, which tells the background; it cannot be used for segmentation")
    foreground = arrays["mask"] != -1 if "mask" in arrays else None
    return Cloud(
        coordinates=arrays["data"].astype(np.float64),
        channels={} if foreground is None else {"foreground": foreground.astype(np.float32)},
        labels=foreground.astype(np.int64) if labelled and foreground is not None else None,
        source=source,
    )
