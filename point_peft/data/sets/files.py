"""Files of the field's sets, read with errors that say what is missing and where it comes from."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import Entry
from point_peft.data.cloud_set import CloudSet
from point_peft.data.optional import optional
from point_peft.data.options import DataOptions
from point_peft.errors import DataError, nearest_names, quoted

Array = npt.NDArray[Any]
KEPT_FILES = 16
"""As many HDF5 files are kept in memory in a process: no more than one set has, and so at most that set."""
ALWAYS_MEANT = (
    *("kind", "task", "variant", "preparation", "seed"),
    *("train_groups", "val_groups", "test_groups", "val_share", "test_share"),
)
"""Options that mean something for every set, or are refused elsewhere."""


def needed(path: Path, holds: str, origin: str) -> Path:
    """The path, if it exists; else raises `DataError` that says what it should hold and where the set comes from."""
    if not path.exists():
        raise DataError(f"{path} is missing; it should hold {holds}, and comes with {origin}; nothing is downloaded")
    return path


def folder_with(path: Path, names: Sequence[str], *patterns: str) -> Path | None:
    """The folder itself, or the one of these names in it, in which something matches one of the patterns."""
    for folder in (path, *(path / name for name in names)):
        if any(next(folder.glob(pattern), None) is not None for pattern in patterns):
            return folder
    return None


def check_options(options: DataOptions, name: str, *more: str, tasks: Sequence[str], variants: Sequence[str]) -> None:
    """Raise `DataError` for a task or a variant that a set has not, and for options that mean nothing for it.

    `more` are options that mean something for this set.
    """
    if options.task is not None and options.task not in tasks:
        raise DataError(f"task is {quoted(options.task)}; {name} is a set for {' and '.join(tasks)}")
    if options.variant is not None and options.variant.lower() not in variants:
        near = nearest_names(options.variant, variants, what="variant") if variants else ""
        allowed = f"{', '.join(variants)}; nearest: {near}" if variants else "None"
        raise DataError(f"variant is {quoted(options.variant)}; allowed for {name}: {allowed}")
    unset = DataOptions()
    for field in fields(options):
        given = getattr(options, field.name)
        if field.name not in (*ALWAYS_MEANT, *more) and given != getattr(unset, field.name):
            raise DataError(f"{field.name} is {quoted(given)}, which says nothing for {name}; leave it out")


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error})") from error
    return [line for line in lines if line]


def json_of(path: Path) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error})") from error


def table_of(path: Path, names: Sequence[str], delimiter: str | None = None) -> npt.NDArray[np.float64]:
    """The numbers (n, columns) of a text file, whose columns are `names`."""
    try:
        table = np.loadtxt(path, delimiter=delimiter, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as rows of {' '.join(names)} ({error})") from error
    if table.shape[1] != len(names):
        raise DataError(f"{path} should hold rows of {' '.join(names)}, but has {table.shape[1]} columns")
    return table


def hdf5_arrays(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """Those of the named arrays that an HDF5 file has; the first must be there."""
    h5py = optional("h5py", "HDF5 files")
    try:
        with h5py.File(path, "r") as file:
            present = list(file)
            arrays = {name: file[name][...] for name in names if name in file}
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as HDF5 ({error}); it may not be complete") from error
    if names[0] not in arrays:
        raise DataError(f"{path} holds no {names[0]}; there are {', '.join(present) or 'no arrays'}")
    return arrays


@lru_cache(KEPT_FILES)
def _kept_arrays(path: Path, names: tuple[str, ...], changed: int) -> dict[str, Array]:
    """The arrays of a file as it was when it was last changed."""
    return hdf5_arrays(path, names)


def hdf5_row(path: Path, row: int, *names: str) -> dict[str, Array]:
    """One row of those of the named arrays that an HDF5 file has; the first must be there.

    The field's files are compressed across rows, so that a row costs as much as a hundred: whole files are kept.
    """
    changed = needed(path, ", ".join(names), "the set").stat().st_mtime_ns
    arrays = _kept_arrays(path, names, changed)
    for name, values in arrays.items():
        if row >= len(values):
            raise DataError(f"{path}: {name} has {len(values)} rows, but there is a label for row {row}")
    return {name: values[row] for name, values in arrays.items()}


def hdf5_labels(path: Path) -> list[int]:
    """The label of each row of an HDF5 file, (m,) or (m, 1) there."""
    return [int(label) for label in hdf5_arrays(path, ["label"])["label"].reshape(-1)]


def class_number(name: str, classes: Sequence[str], path: Path) -> int:
    """The number of a class that a file names."""
    if name not in classes:
        near = nearest_names(name, classes, what="class")
        raise DataError(f"{path}: {quoted(name)} is none of the {len(classes)} classes; nearest: {near}")
    return classes.index(name)


def prepared_set(entries: Iterable[Entry], options: DataOptions, **known: Any) -> CloudSet:
    """A data set of entries, prepared as the options say."""
    return CloudSet(entries=tuple(entries), preparation=options.preparation, seed=options.seed, **known)
