"""Files of clouds, as other programs write them, are read with their coordinates, channels and labels."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import h5py
import laspy
import numpy as np
import numpy.typing as npt
import pytest
import trimesh

from point_peft.data.cloud import Cloud
from point_peft.data.formats.pcd import lzf_decompressed
from point_peft.data.reading import READERS, read_cloud
from point_peft.errors import DataError

FAR = np.array([[637_000.125, 850_000.25, 400.5], [637_001.375, 850_000.5, 401.0], [637_000.0, 849_999.75, 400.0]])
"""Points whose coordinates float32 would round by centimetres."""
UP = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def assert_cloud(cloud: Cloud, xyz: npt.NDArray[Any], labels: list[int] | None = None, **channels: Any) -> None:
    assert cloud.coordinates.dtype == np.float64
    np.testing.assert_array_equal(cloud.coordinates, xyz)
    assert (None if cloud.labels is None else cloud.labels.tolist()) == labels
    assert set(cloud.channels) == set(channels)
    for name, values in channels.items():
        assert cloud.channels[name].dtype == np.float32
        np.testing.assert_allclose(cloud.channels[name], values, rtol=1e-6)


# ---- meshes and PLY --------------------------------------------------------------------------------------------------

PLY = """ply
format ascii 1.0
comment made by hand
element vertex 3
property double x
property double y
property double z
property uchar red
property uchar green
property uchar blue
property float scalar_temperature
property int {label}
end_header
637000.125 850000.25 400.5 255 0 0 1.5 2
637001.375 850000.5 401 0 255 0 2.5 2
637000 849999.75 400 0 0 51 3.5 7
"""
COLOURED = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 0.2], "temperature": [1.5, 2.5, 3.5]}


def test_a_ply_cloud_has_its_properties_as_channels_and_its_labels(tmp_path: Path) -> None:
    cloud = read_cloud(written(tmp_path / "a.ply", PLY.format(label="scalar_Classification")))
    assert_cloud(cloud, FAR, [2, 2, 7], **COLOURED)
    assert cloud.source == str(tmp_path / "a.ply")
    other = written(tmp_path / "b.PLY", PLY.format(label="tree"))
    assert_cloud(read_cloud(other, label_field="Tree"), FAR, [2, 2, 7], **COLOURED)
    assert_cloud(read_cloud(other), FAR, None, **COLOURED, tree=[2, 2, 7])


def test_a_binary_ply_with_normals_is_read(tmp_path: Path) -> None:
    head = "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz"))
    body = np.concatenate([UP * 2, UP], axis=1).astype("<f4").tobytes()
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex 3\n{head}end_header\n"
    cloud = read_cloud(written(tmp_path / "a.ply", head.encode() + body))
    assert_cloud(cloud, UP * 2, nx=UP[:, 0], ny=UP[:, 1], nz=UP[:, 2])


def test_a_mesh_whose_vertices_have_labels_gives_its_vertices(tmp_path: Path) -> None:
    text = PLY.format(label="label").replace(
        "end_header", "element face 1\nproperty list uchar int vertex_indices\nend_header"
    )
    assert_cloud(read_cloud(written(tmp_path / "a.ply", f"{text}3 0 1 2\n")), FAR, [2, 2, 7], **COLOURED)


@pytest.mark.parametrize("suffix", ["ply", "off", "obj", "stl"])
def test_a_mesh_is_sampled_on_its_surface(tmp_path: Path, suffix: str) -> None:
    trimesh.creation.box((2.0, 4.0, 6.0)).export(tmp_path / f"box.{suffix}")
    cloud = read_cloud(tmp_path / f"box.{suffix}", num_samples=2000, seed=1)
    xyz = cloud.coordinates
    assert xyz.shape == (2000, 3)
    on_face = np.isclose(np.abs(xyz), [1.0, 2.0, 3.0])
    assert on_face.any(axis=1).all()
    # Evenly by area: of 88 units, 16 are the two faces across z.
    assert on_face[:, 2].mean() == pytest.approx(16 / 88, abs=0.03)
    normals = np.stack([cloud.channels[name] for name in ("nx", "ny", "nz")], axis=1)
    np.testing.assert_allclose((normals * xyz)[on_face], np.abs(xyz)[on_face], rtol=1e-5)
    again = read_cloud(tmp_path / f"box.{suffix}", num_samples=2000, seed=1)
    np.testing.assert_array_equal(again.coordinates, xyz)
    assert not np.array_equal(read_cloud(tmp_path / f"box.{suffix}", num_samples=2000).coordinates, xyz)


def test_all_objects_of_an_obj_file_are_sampled(tmp_path: Path) -> None:
    text = "o a\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\no b\nv 0 0 9\nv 1 0 9\nv 0 1 9\nf 4 5 6\n"
    cloud = read_cloud(written(tmp_path / "a.obj", text), num_samples=100)
    assert set(cloud.coordinates[:, 2]) == {0.0, 9.0}


def test_an_obj_or_off_file_without_faces_is_a_cloud(tmp_path: Path) -> None:
    text = "".join("v {} {} {}".format(*point) + " 1 0 0.2\n" for point in FAR)
    assert_cloud(read_cloud(written(tmp_path / "a.obj", text)), FAR, red=[1] * 3, green=[0] * 3, blue=[0.2] * 3)
    text = "OFF\n3 0 0\n" + "".join("{} {} {}\n".format(*point) for point in FAR)
    assert_cloud(read_cloud(written(tmp_path / "a.off", text)), FAR)


def test_the_word_off_may_stand_before_the_numbers(tmp_path: Path) -> None:
    cloud = read_cloud(written(tmp_path / "a.off", "OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"), num_samples=10)
    assert cloud.coordinates.shape == (10, 3)


BAD_MESHES: dict[str, tuple[str | bytes, str]] = {
    "empty.ply": (b"", "empty.ply cannot be read .*; it should be a PLY file"),
    "magic.ply": (b"hello", "magic.ply cannot be read .*; it should be a PLY file"),
    "short.ply": (PLY.format(label="label").rsplit("\n", 2)[0], "should hold 3 vertices, as it says, but holds 2"),
    "none.ply": (
        b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nproperty float y\nproperty float z\nend_header\n",
        "none.ply",
    ),
    "cut.ply": (
        b"ply\nformat binary_little_endian 1.0\nelement vertex 9\nproperty float x\nend_header\n12345678",
        "cut.ply cannot be read",
    ),
    "two.ply": (PLY.format(label="temperature"), "two columns mean temperature"),
    "both.ply": (
        PLY.format(label="label").replace("scalar_temperature", "class"),
        "columns label and class may be labels",
    ),
    "part.ply": (
        PLY.format(label="x_2").replace("scalar_temperature", "label"),
        "label should hold whole numbers, the labels, but has 1.5",
    ),
    "flat.ply": (PLY.format(label="label").replace("double z", "double height"), "flat.ply cannot be read .*'z'"),
    "empty.off": (b"", "empty.off cannot be read .*; it should be an OFF file"),
    "magic.off": (b"OFX 3\n", "magic.off cannot be read"),
    "short.off": (b"OFF\n3 1 0\n0 0 0\n1 0 0\n", "short.off cannot be read"),
    "words.off": (b"OFF\n3 1 0\n0 0 0\n1 0 a\n0 1 0\n3 0 1 2\n", "words.off cannot be read .*'a'"),
    "empty.obj": (b"", "empty.obj holds no points; it should be an OBJ file"),
    "words.obj": (b"hello world\n", "words.obj holds no points; it should be an OBJ file"),
    "face.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "face.obj cannot be read .*; it should be an OBJ file"),
    "flat.obj": (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "its faces have no area"),
    "empty.stl": (b"", "empty.stl"),
    "magic.stl": (b"hello", "magic.stl"),
}


@pytest.mark.parametrize("name", BAD_MESHES)
def test_a_bad_mesh_is_named_with_what_it_should_be(tmp_path: Path, name: str) -> None:
    content, message = BAD_MESHES[name]
    with pytest.raises(DataError, match=message):
        read_cloud(written(tmp_path / name, content))


# ---- LAS, LAZ, KITTI -------------------------------------------------------------------------------------------------


def las_file(path: Path, colours: int = 255) -> Path:
    header = laspy.LasHeader(point_format=7, version="1.4")
    header.offsets, header.scales = [637_000, 850_000, 0], [0.001] * 3
    header.add_extra_dim(laspy.ExtraBytesParams("curvature", np.float32))
    header.add_extra_dim(laspy.ExtraBytesParams("tree", np.int32))
    header.add_extra_dim(laspy.ExtraBytesParams("moment", "2f4"))
    las = laspy.LasData(header)
    las.x, las.y, las.z = FAR.T
    las.classification, las.intensity = [2, 6, 17], [10, 20, 65535]
    las.red, las.green, las.blue = [colours, 0, 0], [0, colours, 0], [0, 0, colours]
    las.curvature, las.tree, las["moment"] = [0.5, 1.5, 2.5], [5, 5, 9], [[1, 2], [3, 4], [5, 6]]
    las.write(path)
    return path


@pytest.mark.parametrize("suffix", ["las", "laz"])
@pytest.mark.parametrize("colours", [255, 65535])
def test_a_las_file_keeps_float64_codes_and_all_dimensions(tmp_path: Path, suffix: str, colours: int) -> None:
    cloud = read_cloud(las_file(tmp_path / f"a.{suffix}", colours))
    np.testing.assert_allclose(cloud.coordinates, FAR, atol=1e-6, rtol=0)
    assert cloud.labels is not None
    assert cloud.labels.tolist() == [2, 6, 17]
    expected: dict[str, list[float]] = {
        "red": [1, 0, 0],
        "blue": [0, 0, 1],
        "intensity": [10, 20, 65535],
        "curvature": [0.5, 1.5, 2.5],
        "tree": [5, 5, 9],
        "moment_0": [1, 3, 5],
        "moment_1": [2, 4, 6],
    }
    assert {name: cloud.channels[name].tolist() for name in expected} == expected
    assert "return_number" in cloud.channels
    assert "X" not in cloud.channels


def test_the_labels_of_a_las_file_may_be_another_dimension(tmp_path: Path) -> None:
    cloud = read_cloud(las_file(tmp_path / "a.las"), label_field="tree")
    assert cloud.labels is not None
    assert cloud.labels.tolist() == [5, 5, 9]
    assert cloud.channels["classification"].tolist() == [2, 6, 17]
    with pytest.raises(DataError, match="a.las has no column 'trea' for labels; nearest: 'tree'"):
        read_cloud(tmp_path / "a.las", label_field="trea")


@pytest.mark.parametrize("suffix", ["las", "laz"])
@pytest.mark.parametrize("cut", [0, 4, 100, -1, -3, -52, -61])
def test_a_las_file_that_is_not_complete_is_refused(tmp_path: Path, suffix: str, cut: int) -> None:
    content = las_file(tmp_path / f"a.{suffix}").read_bytes()
    with pytest.raises(DataError, match=rf"b.{suffix} (cannot be read|should hold 3 points, as it says)"):
        read_cloud(written(tmp_path / f"b.{suffix}", content[:cut]))
    with pytest.raises(DataError, match=f"c.{suffix} cannot be read .*; it should be a complete LAS or LAZ file"):
        read_cloud(written(tmp_path / f"c.{suffix}", b"x" * 400))


def test_a_las_file_that_counts_more_records_than_it_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    content = bytearray(las_file(tmp_path / "a.las").read_bytes())
    content[100:104] = b"\xff\xff\xff\x7f"
    with pytest.raises(DataError, match="its header counts 2147483647 records, more than the file can hold"):
        read_cloud(written(tmp_path / "b.las", bytes(content)))


def test_a_scan_of_kitti_is_read(tmp_path: Path) -> None:
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    cloud = read_cloud(written(tmp_path / "a.bin", values.tobytes()))
    assert_cloud(cloud, values[:, :3], intensity=values[:, 3])
    for content in (b"", values.tobytes()[:-1]):
        with pytest.raises(DataError, match=r"b.bin has \d+ bytes; it should hold four float32 values a point"):
            read_cloud(written(tmp_path / "b.bin", content))


# ---- PCD -------------------------------------------------------------------------------------------------------------

PCD = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS x y z rgb _ label moment
SIZE 8 8 8 4 1 2 4
TYPE F F F F U U F
COUNT 1 1 1 1 3 1 2
WIDTH 3
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 3
DATA {data}
"""
PCD_TYPE = np.dtype(
    [(n, "<f8") for n in "xyz"] + [("rgb", "<u4"), ("pad", "u1", 3), ("label", "<u2"), ("moment", "<f4", 2)]
)
PACKED = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 0.2]}
MOMENTS = {"moment_0": [1, 3, 5], "moment_1": [2, 4, 6]}


def pcd_rows() -> npt.NDArray[Any]:
    rows = np.zeros(3, PCD_TYPE)
    rows["x"], rows["y"], rows["z"] = FAR.T
    rows["rgb"] = [255 << 16, 255 << 8, 51]
    rows["label"], rows["moment"] = [3, 4, 4], [[1, 2], [3, 4], [5, 6]]
    return rows


def literal(plain: bytes) -> bytes:
    """LZF that repeats nothing."""
    pieces = [plain[start : start + 32] for start in range(0, len(plain), 32)]
    return b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)


def pcd_file(path: Path, data: str) -> Path:
    rows = pcd_rows()
    head = PCD.format(data=data).encode()
    if data == "binary":
        return written(path, head + rows.tobytes())
    if data == "binary_compressed":
        # One field after the other; of a field of several values each value by itself, as the fields of a point.
        parts = [rows["pad"], rows["moment"]]
        plain = b"".join(rows[name].tobytes() for name in ("x", "y", "z", "rgb"))
        plain += parts[0].T.tobytes() + rows["label"].tobytes() + parts[1].T.tobytes()
        packed = literal(plain)
        return written(path, head + struct.pack("<II", len(packed), len(plain)) + packed)
    colours = rows["rgb"].view("<f4")
    lines = [
        f"{r['x']} {r['y']} {r['z']} {colour:.9g} 0 0 0 {r['label']} {r['moment'][0]} {r['moment'][1]}\n"
        for r, colour in zip(rows, colours, strict=True)
    ]
    return written(path, head + "".join(lines).encode())


@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
def test_a_pcd_file_is_read_in_every_form(tmp_path: Path, data: str) -> None:
    assert_cloud(read_cloud(pcd_file(tmp_path / "a.pcd", data)), FAR, [3, 4, 4], **PACKED, **MOMENTS)


def test_a_pcd_file_without_count_and_with_normals_is_read(tmp_path: Path) -> None:
    names = "x y z normal_x normal_y normal_z"
    head = f"FIELDS {names}\nSIZE{' 4' * 6}\nTYPE{' F' * 6}\nWIDTH 3\nHEIGHT 1\nPOINTS 3\nDATA binary\n"
    body = np.concatenate([UP * 2, UP], axis=1).astype("<f4").tobytes()
    cloud = read_cloud(written(tmp_path / "a.pcd", head.encode() + body))
    assert_cloud(cloud, UP * 2, nx=UP[:, 0], ny=UP[:, 1], nz=UP[:, 2])


def test_lzf_repeats_what_came_before_and_what_is_being_written() -> None:
    # "abc"; 9 bytes from 3 back (which overlap what they write); "x"; 4 bytes from 10 back.
    packed = bytes([2]) + b"abc" + bytes([(7 << 5) | 0, 0, 2]) + bytes([0]) + b"x" + bytes([(2 << 5) | 0, 9])
    assert lzf_decompressed(packed, 17) == b"abcabcabcabcxabca"
    long = bytes([0]) + b"a" + bytes([(7 << 5) | 0, 255, 0])
    assert lzf_decompressed(long, 265) == b"a" * 265
    for broken in (bytes([(1 << 5), 0]), bytes([0]) + b"a" + bytes([7 << 5]), bytes([5]) + b"abc"):
        with pytest.raises(ValueError, match="its compressed data"):
            lzf_decompressed(broken, 6)


BAD_PCD: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "its header has no DATA"),
    "magic": ("hello\nworld\n", "its header has no DATA"),
    "binary": (b"\xff\xfe\n", "cannot be read"),
    "fields": ("FIELDS x y z\nSIZE 4 4 4\nPOINTS 1\nDATA ascii\n1 2 3\n", "its header has no TYPE"),
    "sizes": ("FIELDS x y z\nSIZE 4 4\nTYPE F F F\nPOINTS 1\nDATA ascii\n1 2 3\n", "cannot be read"),
    "type": ("FIELDS x y z\nSIZE 4 4 4\nTYPE F F Q\nPOINTS 1\nDATA ascii\n1 2 3\n", "cannot be read"),
    "data": ("FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 1\nDATA zipped\n1 2 3\n", "its DATA are 'zipped'"),
    "few": (
        "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 2\nDATA ascii\n1 2 3\n",
        "says that it holds 2 points, but it holds 1",
    ),
    "none": (
        "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 2\nDATA ascii\n",
        "says that it holds 2 points, but it holds 0",
    ),
    "zero": ("FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 0\nDATA ascii\n", "holds no points"),
    "words": ("FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 1\nDATA ascii\n1 a 3\n", "'a'"),
    "columns": ("FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 1\nDATA ascii\n1 2\n", "cannot be read"),
    "short": (
        "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 2\nDATA binary\n1234",
        "2 points need 24 bytes, 4 are there",
    ),
    "packed": ("FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 2\nDATA binary_compressed\n12", "cannot be read"),
    "flat": ("FIELDS x y h\nSIZE 4 4 4\nTYPE F F F\nPOINTS 1\nDATA ascii\n1 2 3\n", "it should have x, y and z"),
}


@pytest.mark.parametrize("name", BAD_PCD)
def test_a_bad_pcd_file_is_named_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    content, message = BAD_PCD[name]
    with pytest.raises(DataError, match=f"{name}.pcd .*{message}"):
        read_cloud(written(tmp_path / f"{name}.pcd", content))


@pytest.mark.parametrize("data", ["ascii", "binary", "binary_compressed"])
def test_a_pcd_file_that_is_not_complete_is_refused(tmp_path: Path, data: str) -> None:
    content = pcd_file(tmp_path / "a.pcd", data).read_bytes()
    with pytest.raises(DataError, match="b.pcd cannot be read .*; it should be a PCD file"):
        read_cloud(written(tmp_path / "b.pcd", content[:-8]))


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_an_npy_file_is_a_table_or_has_named_fields(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.concatenate([FAR, [[1], [2], [3]]], axis=1))
    assert_cloud(read_cloud(tmp_path / "a.npy"), FAR, intensity=[1, 2, 3])
    named = np.zeros(3, [("X", "f8"), ("Y", "f8"), ("Z", "f8"), ("class", "u1"), ("r", "u1")])
    named["X"], named["Y"], named["Z"] = FAR.T
    named["class"], named["r"] = [1, 1, 2], [0, 1, 1]
    np.save(tmp_path / "b.npy", named)
    assert_cloud(read_cloud(tmp_path / "b.npy"), FAR, [1, 1, 2], red=[0, 1 / 255, 1 / 255])


def arrays_file(path: Path, **arrays: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values if np.asarray(values).dtype.kind != "U" else np.asarray(values, object)
    return path


@pytest.mark.parametrize("suffix", ["npz", "h5", "hdf5"])
def test_the_arrays_of_one_cloud_are_its_channels_and_labels(tmp_path: Path, suffix: str) -> None:
    path = arrays_file(
        tmp_path / f"a.{suffix}",
        xyz=FAR,
        labels=np.array([[0], [1], [0]]),
        normals=UP,
        colors=np.eye(3, dtype=np.uint8) * 255,
        heat=np.array([1.0, 2.0, 3.0]),
        moment=np.arange(6.0).reshape(3, 2),
        class_names=np.array(["floor", "wall"]),
        sensor=np.float32(4),
    )
    colours = dict(zip(("red", "green", "blue"), np.eye(3), strict=True))
    normals = dict(zip(("nx", "ny", "nz"), UP.T, strict=True))
    moments = {"moment_0": [0, 2, 4], "moment_1": [1, 3, 5]}
    assert_cloud(read_cloud(path), FAR, [0, 1, 0], **colours, **normals, **moments, heat=[1, 2, 3])
    rows = {axis: FAR[:, i] for i, axis in enumerate("xyz")}
    assert_cloud(
        read_cloud(arrays_file(tmp_path / f"b.{suffix}", **rows, gt=[1, 1, 2]), label_field="gt"), FAR, [1, 1, 2]
    )


def test_bad_arrays_are_named_with_what_they_should_be(tmp_path: Path) -> None:
    for suffix in ("npy", "npz", "h5"):
        for content in (b"", b"hello", b"x" * 4000):
            with pytest.raises(
                DataError, match=rf"a.{suffix} cannot be read .*; it should be an? .*{suffix[:1].upper()}"
            ):
                read_cloud(written(tmp_path / f"a.{suffix}", content))
    np.save(tmp_path / "b.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(DataError, match="b.npy cannot be read .*allow_pickle"):
        read_cloud(tmp_path / "b.npy")
    np.savez(tmp_path / "b.npz", points=np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(DataError, match="b.npz cannot be read .*without objects"):
        read_cloud(tmp_path / "b.npz")
    for name, array in {"one": np.zeros(3), "none": np.zeros((0, 3)), "text": np.array([["a", "b", "c"]])}.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(
            DataError, match=rf"{name}.npy holds .*; it should hold numbers of shape \(points, columns\)"
        ):
            read_cloud(tmp_path / f"{name}.npy")
    for suffix in ("npz", "h5"):
        with pytest.raises(
            DataError, match=rf"c.{suffix} holds the arrays places; exactly one of them should be called"
        ):
            read_cloud(arrays_file(tmp_path / f"c.{suffix}", places=FAR))
        with pytest.raises(DataError, match=rf"d.{suffix}: points \(2, 3, 3\) are 2 clouds; .*kind 'arrays'"):
            read_cloud(arrays_file(tmp_path / f"d.{suffix}", points=np.zeros((2, 3, 3))))
        with pytest.raises(
            DataError, match=rf"e.{suffix}: label is int64 \(2,\); it should have one number a point, 3"
        ):
            read_cloud(arrays_file(tmp_path / f"e.{suffix}", points=FAR, label=np.array([1, 2])))
        content = arrays_file(tmp_path / f"f.{suffix}", points=np.arange(3000.0).reshape(-1, 3)).read_bytes()
        with pytest.raises(DataError, match=f"g.{suffix} cannot be read"):
            read_cloud(written(tmp_path / f"g.{suffix}", content[: len(content) // 2]))


# ---- text ------------------------------------------------------------------------------------------------------------


def lines(columns: npt.NDArray[Any], separator: str = " ") -> str:
    return "".join(separator.join(map(repr, row)) + "\n" for row in np.asarray(columns, float).tolist())


@pytest.mark.parametrize("separator", [" ", "  ", "\t", ",", ", ", ";"])
@pytest.mark.parametrize("suffix", ["txt", "xyz", "csv", "pts", "asc"])
def test_text_is_read_with_any_separator(tmp_path: Path, suffix: str, separator: str) -> None:
    assert_cloud(read_cloud(written(tmp_path / f"a.{suffix}", lines(FAR, separator))), FAR)


def test_columns_without_names_are_told_by_their_number(tmp_path: Path) -> None:
    def cloud(*columns: Any) -> Cloud:
        return read_cloud(written(tmp_path / "a.txt", lines(np.column_stack(columns))))

    normals: dict[str, Any] = dict(zip(("nx", "ny", "nz"), UP.T, strict=True))
    colours: dict[str, Any] = {"red": [1, 0, 0.2], "green": [0, 1, 0.2], "blue": [0, 0, 0.2]}
    rgb = np.array([[255, 0, 0], [0, 255, 0], [51, 51, 51]])
    assert_cloud(cloud(FAR, [1, 2, 3]), FAR, intensity=[1, 2, 3])
    assert_cloud(cloud(FAR, UP), FAR, **normals)
    assert_cloud(cloud(FAR, rgb), FAR, **colours)
    assert_cloud(cloud(FAR, rgb / 255), FAR, **colours)
    assert_cloud(cloud(FAR, UP, [4, 5, 5]), FAR, [4, 5, 5], **normals)


@pytest.mark.parametrize(
    "head",
    [
        "x y z r label",
        "# x y z r label",
        "//X Y Z R Label",
        "# from a scanner\n# x y z r label",
        "x,y,z,r,label",
        "\n\nx y z r label\n3",
    ],
)
def test_a_line_of_names_says_what_the_columns_are(tmp_path: Path, head: str) -> None:
    body = lines(np.column_stack([FAR, [255, 0, 51], [1, 2, 2]]), "," if "," in head else " ")
    cloud = read_cloud(written(tmp_path / "a.txt", f"{head}\n{body}"))
    assert_cloud(cloud, FAR, [1, 2, 2], red=[1, 0, 0.2])


def test_the_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    text = "﻿z,y,x,gt\n" + lines(np.column_stack([FAR[:, ::-1], [1, 2, 2]]), ",")
    assert_cloud(read_cloud(written(tmp_path / "a.csv", text), label_field="gt"), FAR, [1, 2, 2])


BAD_TEXT: dict[str, tuple[str | bytes, str]] = {
    "empty.txt": ("", "holds no points; it should hold one point a line"),
    "blank.txt": ("\n# nothing\n", "holds no points; it should hold one point a line"),
    "prose.txt": ("this is\nnot a cloud\n", "holds no points"),
    "binary.txt": (b"\xff\xfe\x00\x81 1 2", "is no text; it should hold one point a line"),
    "words.txt": ("1 2 3\n4 five 6\n", "all numbers, but .*'five'"),
    "ragged.txt": ("1 2 3\n4 5\n", "the same number of columns in every line, all numbers, but .*3 to 2 at row 2"),
    "five.txt": ("1 2 3 4 5\n", "has 5 columns without names; it should have 3"),
    "seven.txt": ("1 2 3 4 5 6 7\n", "has 7 columns without names"),
    "two.txt": ("1 2\n", "has 2 columns without names"),
    "signed.txt": ("1 2 3 -4 5 6\n", "columns 4 to 6 are neither normals"),
    "header.txt": ("x y z label\n1 2 3\n", "its line 'x y z label' should name the 3 columns"),
    "flat.csv": ("x,y,height\n1,2,3\n", "its line 'x,y,height' should name the 3 columns, with x, y and z"),
    "count.pts": ("3\n1 2 3\n4 5 6\n", "should hold 3 points, as it says, but holds 2: it is not complete"),
    "label.txt": ("x y z label\n1 2 3 0.5\n", "column label should hold whole numbers"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_is_named_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    content, message = BAD_TEXT[name]
    with pytest.raises(DataError, match=f"{name}.* {message}"):
        read_cloud(written(tmp_path / name, content))


# ---- any file --------------------------------------------------------------------------------------------------------


def test_an_unknown_suffix_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a.lass: no reader knows the suffix '.lass'; nearest: 'las'.*; known: .ply, .off"
    ):
        read_cloud(tmp_path / "a.lass")


@pytest.mark.parametrize("suffix", READERS)
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match=f"a{suffix} (does not exist|cannot be read)"):
        read_cloud(tmp_path / f"a{suffix}")
    (tmp_path / f"b{suffix}").mkdir()
    with pytest.raises(DataError, match=f"b{suffix} cannot be read"):
        read_cloud(tmp_path / f"b{suffix}")


@pytest.mark.parametrize(("suffix", "module"), [("ply", "trimesh"), ("las", "laspy"), ("laz", "lazrs"), ("h5", "h5py")])
def test_a_package_that_is_not_installed_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"files need {module}, .*: pip install 'point-peft\[data\]'"):
        read_cloud(written(tmp_path / f"a.{suffix}", b""))
