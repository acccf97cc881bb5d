"""A whole set of clouds of one size in one NPZ or HDF5 file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import COORDINATES, Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.formats.arrays import POINTS, Arrays, arrays_in, columns_of, points_of
from point_peft.data.formats.columns import LABELS, Wanted, cloud_of_columns, whole_numbers
from point_peft.data.options import DataOptions
from point_peft.data.splitting import SPLIT_NAMES
from point_peft.errors import DataError, nearest_names, quoted

NUMBERED_SPLITS: dict[str, Split] = {"0": "train", "1": "test"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySet:
    """The arrays of a set: clouds are views of them, until one is read."""

    path: Path
    points: npt.NDArray[Any]
    """(m, n, 3)"""
    per_point: Arrays = field(default_factory=dict)
    """(m, n) or (m, n, k), without labels."""
    labels: npt.NDArray[np.int64] | None = None
    """(m, n): of points."""

    def cloud(self, index: int) -> Cloud:
        """One cloud, with all that there is of its points."""
        columns = dict(zip(COORDINATES, np.moveaxis(self.points[index], -1, 0), strict=True))
        for name, values in self.per_point.items():
            columns.update(columns_of(name, values[index]))
        if self.labels is not None:
            columns["label"] = self.labels[index]
        return cloud_of_columns(columns, Path(f"{self.path}[{index}]"), Wanted())


def read_array_set(path: Path, options: DataOptions = DataOptions()) -> CloudSet:  # noqa: B008 - it is frozen
    """The clouds of a file of arrays: points (m, n, 3), labels (m,) of clouds or (m, n) of points.

    Other arrays (m, n) or (m, n, k) become channels. `class_names`, `split` (0 train, 1 test, or names) and the column
    `options.group` (m,) are used if they are there. All arrays are held in memory, once.
    """
    arrays = arrays_in(path)
    name = points_of(arrays, path)
    points = arrays[name]
    if points.ndim != 3 or points.shape[2] != 3 or points.dtype.kind not in "iuf" or points.size == 0:
        raise DataError(f"{path}: {name} is {points.dtype} {points.shape}; it should be numbers (clouds, points, 3)")
    count, size = points.shape[:2]
    label_name = _label_name(arrays, path, options.label_field)
    per_point = {
        other: values
        for other, values in arrays.items()
        if other not in (name, label_name) and values.ndim in (2, 3) and values.shape[:2] == (count, size)
    }
    labels, classes = _labels(arrays, label_name, (count, size), path)
    of_points = labels is not None and labels.ndim == 2
    task = "segmentation" if of_points else "classification"
    if options.task not in (None, task):
        raise DataError(
            f"{path}: the labels are {'of points' if of_points else 'of clouds or absent'}, which is {task}, not "
            f"{options.task}"
        )
    kept = ArraySet(path=path, points=points, per_point=per_point, labels=labels if of_points else None)
    of_clouds = labels.tolist() if labels is not None and not of_points else [None] * count
    groups = _column(arrays, options.group, count, path) if options.group else [""] * count
    entries = [
        Entry(
            read=partial(kept.cloud, index),
            source=f"{path}[{index}]",
            label=of_clouds[index],
            group=groups[index],
            split=split,
        )
        for index, split in enumerate(_splits(arrays, count, path))
    ]
    return CloudSet(
        entries=tuple(entries),
        task="segmentation" if of_points else "classification",
        classes=classes,
        preparation=options.preparation,
        seed=options.seed,
    )


def holds_array_set(path: Path) -> bool:
    """True of a file of arrays whose points are of several clouds."""
    return any(values.ndim == 3 for values in arrays_in(path, POINTS).values())


def _label_name(arrays: Arrays, path: Path, field: str | None) -> str | None:
    if field is not None and field not in arrays:
        near = nearest_names(field, list(arrays), what="array")
        raise DataError(f"{path} has no array {quoted(field)} for labels; nearest: {near}")
    found = [field] if field is not None else [name for name in arrays if name.lower() in LABELS]
    if len(found) > 1:
        raise DataError(f"{path}: the arrays {' and '.join(found)} may be labels; name one of them by label_field")
    return found[0] if found else None


def _labels(
    arrays: Arrays, name: str | None, shape: tuple[int, int], path: Path
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels (m,) or (m, n), or None, and the names of the classes."""
    names = tuple(map(str, arrays["class_names"].reshape(-1).tolist())) if "class_names" in arrays else ()
    if name is None:
        return None, names
    values = arrays[name]
    values = values[:, 0] if values.shape == (shape[0], 1) else values
    if values.shape not in (shape, shape[:1]):
        raise DataError(
            f"{path}: {name} is {values.shape}; it should have one label a cloud, {shape[:1]}, or a point, {shape}"
        )
    if values.dtype.kind == "U":
        names = names or tuple(np.unique(values).tolist())
        unknown = sorted(set(np.unique(values).tolist()) - set(names))
        if unknown:
            raise DataError(f"{path}: {name} has {quoted(unknown[0])}, which is none of class_names")
        order = np.argsort(names)
        return order[np.searchsorted(names, values, sorter=order)].astype(np.int64), names
    labels = whole_numbers(values, f"{path}: {name}")
    names = names or tuple(map(str, range(int(labels.max()) + 1)))
    if labels.min() < -1 or labels.max() >= len(names):
        raise DataError(
            f"{path}: {name} goes from {labels.min()} to {labels.max()}; it should be 0 to {len(names) - 1}, a class "
            "each, or -1 where it is unknown"
        )
    return labels, names


def _column(arrays: Arrays, name: str, count: int, path: Path) -> list[str]:
    """An array (m,) as text; raises `DataError` with the names of those that there are."""
    columns = [other for other, values in arrays.items() if values.shape in ((count,), (count, 1))]
    if name not in columns:
        raise DataError(
            f"{path} has no array {quoted(name)} of one value a cloud; there are {', '.join(columns) or 'none'}"
        )
    return [str(value) for value in arrays[name].reshape(-1).tolist()]


def _splits(arrays: Arrays, count: int, path: Path) -> Sequence[Split | None]:
    if "split" not in arrays:
        return [None] * count
    meanings = {**SPLIT_NAMES, **NUMBERED_SPLITS}
    values = [value.lower() for value in _column(arrays, "split", count, path)]
    wrong = sorted(set(values) - set(meanings))
    if wrong:
        known = ", ".join(SPLIT_NAMES)
        raise DataError(
            f"{path}: split has {quoted(wrong[0])}; it should be 0 for training, 1 for test, or one of {known}"
        )
    return [meanings[value] for value in values]
