"""PCD files, those of the Point Cloud Library: ascii, binary and binary_compressed."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import Cloud
from point_peft.data.formats.columns import COLOURS, Wanted, cloud_of_columns
from point_peft.errors import DataError

FORM = "a PCD file: a header with FIELDS, SIZE, TYPE, POINTS and DATA ascii, binary or binary_compressed, and the data"
TYPES = {"F": "f", "I": "i", "U": "u"}
PADDING = "_"
PACKED = ("rgb", "rgba")
"""Fields that hold a colour in the lowest three bytes of four."""
LONGEST_HEADER = 64 << 10


class Header(NamedTuple):
    """The form of the data that follow."""

    record: np.dtype[Any]
    """One point; fields of several values are columns `name_0`, `name_1`."""
    points: int
    data: str


def read_pcd(path: Path, wanted: Wanted) -> Cloud:
    """The points of a PCD file, its fields as columns; a packed colour becomes red, green and blue."""
    content = path.read_bytes()
    try:
        header, start = _header(content)
        rows = _rows(header, content[start:])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); it should be {FORM}") from error
    columns: dict[str, npt.NDArray[Any]] = {}
    for name in header.record.names or ():
        values = rows[name]
        if name.lower() in PACKED and values.dtype.itemsize == 4:
            bits = np.ascontiguousarray(values).view(np.uint32)
            columns.update({colour: (bits >> shift) & 255 for colour, shift in zip(COLOURS, (16, 8, 0), strict=True)})
        elif not name.startswith(PADDING):
            columns[name] = values
    return cloud_of_columns(columns, path, wanted)


def _header(content: bytes) -> tuple[Header, int]:
    """The header and the place where the data begin; raises `ValueError` or `LookupError` where it is none."""
    entries: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in entries:
        end = content.find(b"\n", start)
        if end < 0 or end > LONGEST_HEADER:
            raise ValueError("its header has no DATA")
        words = content[start:end].decode("ascii").split()
        start = end + 1
        if words and not words[0].startswith("#"):
            entries[words[0].upper()] = words[1:]
    missing = [name for name in ("FIELDS", "SIZE", "TYPE", "POINTS") if name not in entries]
    if missing:
        raise ValueError(f"its header has no {missing[0]}")
    names, counts = entries["FIELDS"], entries.get("COUNT", ["1"] * len(entries["FIELDS"]))
    fields: list[tuple[str, str]] = []
    for place, (name, size, kind, count) in enumerate(
        zip(names, entries["SIZE"], entries["TYPE"], counts, strict=True)
    ):
        form = f"<{TYPES[kind.upper()]}{int(size)}"
        unique = f"{PADDING}{place}" if name == PADDING else name
        fields += [(unique if int(count) == 1 else f"{unique}_{i}", form) for i in range(int(count))]
    return Header(np.dtype(fields), int(entries["POINTS"][0]), entries["DATA"][0].lower()), start


def _rows(header: Header, body: bytes) -> Any:
    """The points as a structured array or, of compressed data, as columns by name: both are read by `rows[name]`."""
    needed = header.points * header.record.itemsize
    if header.points < 0:
        raise ValueError(f"its POINTS are {header.points}")
    if header.data == "ascii":
        return _text_rows(header, body)
    if header.data == "binary":
        if len(body) < needed:
            raise ValueError(f"{header.points} points need {needed} bytes, {len(body)} are there")
        return np.frombuffer(body, header.record, header.points)
    if header.data != "binary_compressed":
        raise ValueError(f"its DATA are {header.data!r}")
    packed, size = (int(value) for value in np.frombuffer(body[:8], "<u4"))
    if size != needed or len(body) < 8 + packed:
        raise ValueError(f"{header.points} points need {needed} bytes, {size} of them in {packed} packed; it has fewer")
    plain, columns, place = lzf_decompressed(body[8 : 8 + packed], size), {}, 0
    for name in header.record.names or ():
        form = header.record[name]
        columns[name] = np.frombuffer(plain, form, header.points, place)
        place += header.points * form.itemsize
    return columns


def _text_rows(header: Header, body: bytes) -> npt.NDArray[Any]:
    lines = io.BytesIO(body)
    if not body.strip():
        return np.empty(0, header.record) if not header.points else _too_few(header, 0)
    rows = np.loadtxt(lines, header.record, comments="#", ndmin=1, encoding="ascii")
    return rows if len(rows) == header.points else _too_few(header, len(rows))


def _too_few(header: Header, found: int) -> npt.NDArray[Any]:
    raise ValueError(f"it says that it holds {header.points} points, but it holds {found}")


def lzf_decompressed(packed: bytes, size: int) -> bytes:
    """The `size` bytes that LZF made `packed` of; raises `ValueError` if it did not.

    A control byte below 32 is followed by one byte more than its value, as they are. Any other repeats what came
    before: its upper three bits are the length less 2 (7: the next byte is added), its lower five the upper bits of the
    distance less 1, of which the next byte has the rest.
    """
    plain, place = bytearray(), 0
    try:
        while place < len(packed):
            control = packed[place]
            place += 1
            if control < 32:
                plain += packed[place : place + control + 1]
                place += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += packed[place]
                place += 1
            start = len(plain) - ((control & 31) << 8) - packed[place] - 1
            place += 1
            if start < 0:
                raise ValueError("its compressed data refer to what is before their beginning")
            repeated = plain[start : start + length + 2]
            # What is repeated may overlap what is being written.
            plain += (repeated * ((length + 2) // len(repeated) + 1))[: length + 2]
    except IndexError as error:
        raise ValueError("its compressed data end early") from error
    if len(plain) != size:
        raise ValueError(f"its compressed data become {len(plain)} bytes instead of {size}")
    return bytes(plain)
