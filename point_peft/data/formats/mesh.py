"""Meshes, sampled on their surface, and clouds in the formats of meshes: PLY, OFF, OBJ, STL."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import COORDINATES, Cloud
from point_peft.data.formats.columns import COLOURS, LABELS, NORMALS, Wanted, cloud_of_columns, column_name
from point_peft.data.optional import optional
from point_peft.errors import DataError

FORMS = {
    ".ply": "a PLY file: a header from 'ply' to 'end_header', then all the vertices and faces that it counts",
    ".off": "an OFF file: OFF, the numbers of vertices and faces, then so many lines of them",
    ".obj": "an OBJ file: lines 'v x y z' for vertices and 'f i j k' for faces",
    ".stl": "an STL file: triangles, as text or binary",
}
PARSING = (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError)
"""Errors of trimesh for files that are not what their suffix says."""


def read_mesh(path: Path, wanted: Wanted) -> Cloud:
    """The vertices of a cloud, or of a PLY mesh whose vertices have labels; of any other mesh, points on its surface.

    These are drawn evenly by area, `num_samples` of them, with the normals of their faces.
    """
    trimesh = optional("trimesh", "PLY, OFF, OBJ and STL files")
    form = FORMS[path.suffix.lower()]
    surface_only = {"skip_materials": True} if path.suffix.lower() == ".obj" else {}
    try:
        parts = list(trimesh.load_scene(path, process=False, **surface_only).dump())
        meshes = [part for part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces) > 0]
        _check_faces(meshes)
        vertices = _columns(parts[0]) if len(parts) == 1 else {}
    except PARSING as error:
        raise DataError(f"{path} cannot be read ({error}); it should be {form}") from error
    if not parts:
        raise DataError(f"{path} holds no points; it should be {form}")
    if len(parts) == 1 and (not meshes or _has_labels(vertices, wanted)):
        return cloud_of_columns(vertices, path, wanted)
    if len(meshes) < len(parts):
        raise DataError(f"{path} holds loose points beside others or meshes; it should hold one cloud, or meshes only")
    return _sampled(trimesh, meshes, path, wanted)


def _check_faces(meshes: list[Any]) -> None:
    for mesh in meshes:
        if mesh.faces.min() < 0 or mesh.faces.max() >= len(mesh.vertices):
            raise ValueError("faces have vertices that there are not")


def _has_labels(columns: dict[str, npt.NDArray[Any]], wanted: Wanted) -> bool:
    names = {column_name(name) for name in columns}
    return bool(names & set(LABELS)) or wanted.label_field is not None


def _columns(part: Any) -> dict[str, npt.NDArray[Any]]:
    """The properties of vertices, all those of a PLY file, by name; raises `ValueError` where some are missing."""
    raw = part.metadata.get("_ply_raw", {}).get("vertex")
    if raw is not None:
        columns = {name: np.asarray(raw["data"][name]).reshape(-1) for name in raw["properties"]}
        lists = [name for name, values in columns.items() if values.dtype.kind not in "iuf"]
        if lists:
            raise ValueError(f"the property {lists[0]} of its vertices is no number")
        found = {len(values) for values in columns.values()} or {0}
        if found != {raw["length"]}:
            raise ValueError(f"it should hold {raw['length']} vertices, as it says, but holds {min(found)}")
        return columns
    columns = dict(zip(COORDINATES, np.asarray(part.vertices).T, strict=True))
    if part.visual.kind == "vertex":
        columns.update(zip(COLOURS, np.asarray(part.visual.vertex_colors)[:, :3].T, strict=True))
    return columns


def _sampled(trimesh: Any, meshes: list[Any], path: Path, wanted: Wanted) -> Cloud:
    mesh = trimesh.util.concatenate(meshes)
    if not np.isfinite(mesh.vertices).all() or not mesh.area > 0:
        raise DataError(f"{path} should be a mesh with a surface, but its faces have no area or are not finite")
    points, faces = trimesh.sample.sample_surface(mesh, wanted.num_samples, seed=wanted.seed)
    normals = np.asarray(mesh.face_normals[faces], np.float32)
    return Cloud(
        coordinates=np.asarray(points, np.float64),
        channels=dict(zip(NORMALS, normals.T, strict=True)),
        source=str(path),
    )
