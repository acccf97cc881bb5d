"""Reading one cloud from a file of any known format."""

from collections.abc import Callable
from pathlib import Path

from point_peft.data.cloud import Cloud
from point_peft.data.formats.arrays import read_arrays, read_npy
from point_peft.data.formats.columns import Wanted
from point_peft.data.formats.lidar import read_kitti, read_las
from point_peft.data.formats.mesh import read_mesh
from point_peft.data.formats.pcd import read_pcd
from point_peft.data.formats.text import read_text
from point_peft.errors import DataError, nearest_names

READERS: dict[str, Callable[[Path, Wanted], Cloud]] = {
    ".ply": read_mesh,
    ".off": read_mesh,
    ".obj": read_mesh,
    ".stl": read_mesh,
    ".las": read_las,
    ".laz": read_las,
    ".bin": read_kitti,
    ".pcd": read_pcd,
    ".npy": read_npy,
    ".npz": read_arrays,
    ".h5": read_arrays,
    ".hdf5": read_arrays,
    ".txt": read_text,
    ".xyz": read_text,
    ".csv": read_text,
    ".pts": read_text,
    ".asc": read_text,
}
"""Suffix -> the function that reads such a file."""


def read_cloud(path: Path, *, num_samples: int = 10_000, seed: int = 0, label_field: str | None = None) -> Cloud:
    """The cloud of a file, by its suffix; of a mesh, `num_samples` points drawn on its surface with `seed`.

    `label_field` names the column of the points' labels, where it is none of those that are known. Raises `DataError`
    for files that are missing, unknown, or not what their suffix says.
    """
    read = READERS[known_suffix(path)]
    try:
        return read(path, Wanted(num_samples, seed, label_field))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; it should be a file that holds a cloud") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def known_suffix(path: Path) -> str:
    """The suffix of a file, in lower case; raises `DataError` if no reader is known for it."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        near = nearest_names(suffix.lstrip("."), [known.lstrip(".") for known in READERS], what="suffix")
        raise DataError(f"{path}: no reader knows the suffix {suffix!r}; nearest: {near}; known: {', '.join(READERS)}")
    return suffix
