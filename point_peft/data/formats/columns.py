"""One cloud from named columns or from a bare table: which are coordinates, colours, normals and labels."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import COORDINATES, Cloud
from point_peft.errors import DataError, nearest_names, quoted

Columns = Mapping[str, npt.NDArray[Any]]

COLOURS, NORMALS = ("red", "green", "blue"), ("nx", "ny", "nz")
LABELS = ("label", "labels", "class", "classification", "semantic", "sem_label")
SYNONYMS = {
    **dict(zip(("r", "g", "b"), COLOURS, strict=True)),
    **dict(zip(("diffuse_red", "diffuse_green", "diffuse_blue"), COLOURS, strict=True)),
    **dict(zip(("normal_x", "normal_y", "normal_z"), NORMALS, strict=True)),
    "i": "intensity",
    "reflectance": "intensity",
}
UNIT = (0.98, 1.02)
"""Three columns whose length lies in between in every row are a normal."""


class Wanted(NamedTuple):
    """Stated by the caller of `read_cloud`, for the formats that it concerns."""

    num_samples: int = 10_000
    seed: int = 0
    label_field: str | None = None


def column_name(name: str) -> str:
    """The name of a channel for that of a column in a file; CloudCompare writes "scalar_" before its own."""
    plain = name.strip().strip("\"'").lower().removeprefix("scalar_")
    return SYNONYMS.get(plain, plain)


def cloud_of_columns(columns: Columns, path: Path, wanted: Wanted) -> Cloud:
    """The cloud of columns (n,): x, y, z, colours of any scale, labels if there are, and everything else as a channel.

    Raises `DataError` where coordinates are missing, two columns have one meaning, labels are no whole numbers, or
    there are no points.
    """
    named: dict[str, npt.NDArray[Any]] = {}
    for name, values in columns.items():
        if column_name(name) in named:
            raise DataError(f"{path}: two columns mean {column_name(name)}; one of them is {quoted(name)}")
        named[column_name(name)] = values
    if not set(COORDINATES) <= set(named):
        raise DataError(f"{path} has the columns {', '.join(columns) or 'none'}; it should have x, y and z")
    if len(named["x"]) == 0:
        raise DataError(f"{path} holds no points")
    label = _label_column(named, path, wanted.label_field)
    others = {name: values for name, values in named.items() if name not in (*COORDINATES, label)}
    return Cloud(
        coordinates=np.stack([np.asarray(named[axis], np.float64) for axis in COORDINATES], axis=1),
        channels=_scaled_colours({name: np.asarray(values) for name, values in others.items()}),
        labels=None if label is None else whole_numbers(named[label], f"{path}: column {label}"),
        source=str(path),
    )


def _label_column(columns: Columns, path: Path, field: str | None) -> str | None:
    """The column of the labels: the one that is asked for, else the only one that is called so."""
    if field is not None:
        if column_name(field) not in columns:
            near = nearest_names(field, list(columns), what="column")
            raise DataError(f"{path} has no column {quoted(field)} for labels; nearest: {near}")
        return column_name(field)
    found = [name for name in LABELS if name in columns]
    if len(found) > 1:
        raise DataError(f"{path}: the columns {' and '.join(found)} may be labels; name one of them by label_field")
    return found[0] if found else None


def whole_numbers(values: npt.NDArray[Any], what: str) -> npt.NDArray[np.int64]:
    """The same numbers as integers; raises `DataError` if they are none."""
    if values.dtype.kind not in "iuf":
        raise DataError(f"{what} should hold whole numbers, but is of type {values.dtype}")
    if values.dtype.kind == "f":
        wrong = values[~np.isfinite(values) | (values != np.round(values))]
        if wrong.size:
            raise DataError(f"{what} should hold whole numbers, the labels, but has {wrong.flat[0]}")
    return values.astype(np.int64)


def _scaled_colours(columns: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
    """Channels as float32, colours from 0 to 1.

    Colours that are whole numbers, or above 1, have a scale of 255, or of 65535 where one of them is above 255.
    """
    colours = [columns[name] for name in COLOURS if name in columns]
    highest = max((float(np.fmax.reduce(values)) for values in colours), default=0.0)
    whole = all(values.dtype.kind in "iu" for values in colours)
    scale = 65535.0 if highest > 255 else 255.0 if whole or highest > 1 else 1.0
    # What is too large for float32 becomes infinity, which the preparation refuses where the channel is asked for.
    with np.errstate(over="ignore"):
        return {
            name: (values / scale if name in COLOURS else values).astype(np.float32) for name, values in columns.items()
        }


def cloud_of_table(table: npt.NDArray[Any], path: Path, wanted: Wanted) -> Cloud:
    """The cloud of a table (n, c) without names of columns, told by their number.

    3: coordinates. 4: and intensity. 6: and a normal if those three columns have length 1 in every row, else colours.
    7: coordinates, normal, label. Everything else needs names.
    """
    if table.ndim != 2 or len(table) == 0 or table.dtype.kind not in "iuf":
        raise DataError(
            f"{path} holds {table.dtype} of shape {table.shape}; it should hold numbers of shape (points, columns)"
        )
    width = table.shape[1]
    normal = width in (6, 7) and _are_normals(table[:, 3:6])
    names: dict[tuple[int, bool], tuple[str, ...]] = {
        (3, False): COORDINATES,
        (4, False): (*COORDINATES, "intensity"),
        (6, True): (*COORDINATES, *NORMALS),
        (6, False): (*COORDINATES, *COLOURS),
        (7, True): (*COORDINATES, *NORMALS, "label"),
    }
    if (width, normal) not in names:
        raise DataError(
            f"{path} has {width} columns without names; it should have 3 (x y z), 4 (and intensity), 6 (and colours or "
            "normals) or 7 (x y z, normal, label), or a line of names such as 'x y z label' or the like"
        )
    columns = dict(zip(names[width, normal], np.moveaxis(table, 1, 0), strict=True))
    if width == 6 and not normal and min(np.min(columns[name]) for name in COLOURS) < 0:
        raise DataError(
            f"{path}: columns 4 to 6 are neither normals, of length 1, nor colours, of 0 or more; name the columns in "
            "a first line"
        )
    return cloud_of_columns(columns, path, wanted)


def _are_normals(rows: npt.NDArray[Any]) -> bool:
    lengths = np.linalg.norm(np.asarray(rows, np.float64), axis=1)
    known = lengths[np.isfinite(lengths)]
    return len(known) > 0 and bool(np.all((known > UNIT[0]) & (known < UNIT[1])))
