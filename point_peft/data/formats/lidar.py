"""Files of laser scanners: LAS and LAZ, and the raw scans of KITTI."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import Cloud
from point_peft.data.formats.columns import Wanted, cloud_of_columns, cloud_of_table
from point_peft.data.optional import optional
from point_peft.errors import DataError

DAMAGED = (ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError, struct.error)
"""Errors of laspy and lazrs for files that are cut off or damaged."""
HEADER = 247
RECORDS = ((100, 54), (243, 60))
"""The places of the numbers of records in the header of a LAS file, the second in version 1.4, and a record's bytes."""
KITTI = np.dtype("<f4")
KITTI_COLUMNS = 4


def read_las(path: Path, wanted: Wanted) -> Cloud:
    """The points of a LAS or LAZ file: scaled coordinates, all its dimensions as channels, codes of classes as labels.

    A point's class is the code of the file, such as 2 for ground; colours are from 0 to 1, also those that have 8 bits
    where 16 are meant.
    """
    what = "LAS and LAZ files"
    laspy = optional("laspy", what)
    if path.suffix.lower() == ".laz":
        optional("lazrs", "LAZ files")
    try:
        _check_records(path)
        las = laspy.read(path)
        columns = _columns(las)
    except (laspy.errors.LaspyException, *DAMAGED) as error:
        raise DataError(f"{path} cannot be read ({error}); it should be a complete LAS or LAZ file") from error
    expected = las.header.point_count
    if len(columns["x"]) != expected:
        raise DataError(f"{path} should hold {expected} points, as it says, but holds {len(columns['x'])}")
    return cloud_of_columns(columns, path, wanted)


def _check_records(path: Path) -> None:
    """Raise `ValueError` where a header counts more records than fit into the file, which laspy would go through."""
    with path.open("rb") as file:
        head = file.read(HEADER)
    for place, least in RECORDS if head.startswith(b"LASF") and len(head) == HEADER else ():
        (count,) = struct.unpack_from("<I", head, place)
        if place < int.from_bytes(head[94:96], "little") and count * least > path.stat().st_size:
            raise ValueError(f"its header counts {count} records, more than the file can hold")


def _columns(las: Any) -> dict[str, npt.NDArray[Any]]:
    columns = {axis: np.asarray(getattr(las, axis), np.float64) for axis in ("x", "y", "z")}
    for dimension in las.point_format.dimensions:
        values = np.asarray(las[dimension.name])
        if dimension.name in ("X", "Y", "Z"):  # the coordinates again, as integers before scale and offset
            continue
        if values.ndim == 1:
            columns[dimension.name] = values
        else:
            columns.update({f"{dimension.name}_{i}": column for i, column in enumerate(np.moveaxis(values, 1, 0))})
    return columns


def read_kitti(path: Path, wanted: Wanted) -> Cloud:
    """The points of a scan as KITTI has them: nothing but float32, four a point: x, y, z, intensity."""
    size = path.stat().st_size
    if size == 0 or size % (KITTI.itemsize * KITTI_COLUMNS):
        raise DataError(
            f"{path} has {size} bytes; it should hold four float32 values a point: x, y, z, intensity, 16 bytes"
        )
    return cloud_of_table(np.fromfile(path, KITTI).reshape(-1, KITTI_COLUMNS), path, wanted)
