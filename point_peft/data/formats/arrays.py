"""Clouds in the arrays of NumPy and HDF5: NPY, NPZ, H5."""

import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import COORDINATES, Cloud
from point_peft.data.formats.columns import COLOURS, LABELS, NORMALS, Wanted, cloud_of_columns, cloud_of_table
from point_peft.data.optional import optional
from point_peft.errors import DataError

POINTS = ("points", "xyz", "coordinates", "coords", "vertices", "pos", "data")
"""Names of the array of coordinates."""
VECTORS = {
    **dict.fromkeys(("colors", "colours", "color", "colour", "rgb"), COLOURS),
    **dict.fromkeys(("normals", "normal"), NORMALS),
}
"""Names of arrays of three columns that are colours or normals."""
NPY_MAGIC = b"\x93NUMPY"
NPY_ERRORS = (EOFError, MemoryError, SyntaxError, TypeError, ValueError, tokenize.TokenError)
"""Errors of NumPy for files that are cut off or damaged, whose headers it parses as Python does."""
Arrays = Mapping[str, npt.NDArray[Any]]


def read_npy(path: Path, wanted: Wanted) -> Cloud:
    """The points of an array (n, c), or of a structured array with named fields (n,)."""
    try:
        with path.open("rb") as file:
            if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
                raise ValueError("it does not begin as an NPY file")
            file.seek(0)
            table = np.load(file, allow_pickle=False)
    except NPY_ERRORS as error:
        raise DataError(
            f"{path} cannot be read ({error}); it should be an NPY file of numbers (points, columns)"
        ) from error
    if table.dtype.names:
        return cloud_of_columns({name: table[name] for name in table.dtype.names}, path, wanted)
    return cloud_of_table(table, path, wanted)


def arrays_in(path: Path, only: Sequence[str] | None = None) -> Arrays:
    """The arrays of an NPZ file, or those at the top of an HDF5 file; text as arrays of str.

    `only` are names in lower case: other arrays are not read.
    """
    read = _hdf5_arrays if path.suffix.lower() in (".h5", ".hdf5") else _npz_arrays
    return read(path, lambda name: only is None or name.lower() in only)


def _npz_arrays(path: Path, wanted: Callable[[str], bool]) -> Arrays:
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no zip archive, or not complete")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive if wanted(name)}
    except (*NPY_ERRORS, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); it should be an NPZ file of arrays without objects"
        ) from error


def _hdf5_arrays(path: Path, wanted: Callable[[str], bool]) -> Arrays:
    h5py = optional("h5py", "HDF5 files")
    try:
        with h5py.File(path, "r") as file:
            return {
                name: np.asarray(item.asstr()[...], str) if h5py.check_string_dtype(item.dtype) else item[...]
                for name, item in file.items()
                if isinstance(item, h5py.Dataset) and wanted(name)
            }
    except (OSError, ValueError, KeyError, MemoryError, RuntimeError) as error:
        raise DataError(f"{path} cannot be read ({error}); it should be a complete HDF5 file") from error


def points_of(arrays: Arrays, path: Path) -> str:
    """The name of the array of coordinates."""
    found = [name for name in arrays if name.lower() in POINTS]
    if len(found) != 1:
        raise DataError(
            f"{path} holds the arrays {', '.join(arrays) or 'none'}; exactly one of them should be called "
            f"{', '.join(POINTS[:-1])} or {POINTS[-1]}"
        )
    return found[0]


def read_arrays(path: Path, wanted: Wanted) -> Cloud:
    """One cloud of an NPZ or HDF5 file: points (n, 3 or more), and (n,) or (n, k) for each further thing of a point.

    Arrays (n,) called x, y and z do as well. Arrays of another length or of text say nothing of points and are no
    channels.
    """
    arrays = arrays_in(path)
    if set(COORDINATES) <= {name.lower() for name in arrays}:
        length = len(next(values for name, values in arrays.items() if name.lower() == "x").reshape(-1))
        columns: dict[str, npt.NDArray[Any]] = {}
    else:
        name = points_of(arrays, path)
        points = arrays[name]
        if points.ndim == 3:
            raise DataError(
                f"{path}: {name} {points.shape} are {len(points)} clouds; one cloud is (points, 3), a whole set is "
                "opened as kind 'arrays'"
            )
        cloud = cloud_of_table(points, path, wanted._replace(label_field=None))
        length = len(points)
        columns = {**dict(zip(COORDINATES, cloud.coordinates.T, strict=True)), **cloud.channels}
        if cloud.labels is not None:
            columns["label"] = cloud.labels
        arrays = {other: values for other, values in arrays.items() if other != name}
    for name, values in arrays.items():
        if values.dtype.kind in "iufb" and values.ndim in (1, 2) and len(values) == length:
            columns.update(columns_of(name, values))
        elif name.lower() in LABELS or name == wanted.label_field:
            raise DataError(
                f"{path}: {name} is {values.dtype} {values.shape}; it should have one number a point, {length}"
            )
    return cloud_of_columns(columns, path, wanted)


def columns_of(name: str, values: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The named columns of an array (…,) or (…, k), where … are the points."""
    if values.ndim == 1:
        yield name, values
    elif values.shape[1] == 1:
        yield name, values[:, 0]
    elif name.lower() in VECTORS and values.shape[1] == 3:
        yield from zip(VECTORS[name.lower()], np.moveaxis(values, 1, 0), strict=True)
    else:
        yield from ((f"{name}_{i}", column) for i, column in enumerate(np.moveaxis(values, 1, 0)))
