"""Clouds as text: one point a line, columns apart by blanks, commas or semicolons."""

from itertools import islice
from pathlib import Path

import numpy as np

from point_peft.data.cloud import Cloud
from point_peft.data.formats.columns import Wanted, cloud_of_columns, cloud_of_table, column_name
from point_peft.errors import DataError, quoted

COMMENTS = ("#", "//")
LONGEST_HEAD = 100
"""Lines before the first point."""


def read_text(path: Path, wanted: Wanted) -> Cloud:
    """The points of a text file, which may begin with comments, a line of names, and the number of points.

    The names stand in the first line, or in a comment that has as many words as there are columns, x, y and z among
    them; without names the columns are told by their number, see `cloud_of_table`.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = [line.strip() for line in islice(file, LONGEST_HEAD)]
        first = next((number for number, line in enumerate(head) if _is_data(line)), None)
        if first is None:
            raise DataError(f"{path} holds no points; it should hold one point a line: x y z and further columns")
        separator = next((mark for mark in ",;" if mark in head[first]), None)
        table = np.loadtxt(path, comments=COMMENTS, delimiter=separator, skiprows=first, ndmin=2, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text; it should hold one point a line: x y z and further columns") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).split(";")[0].rstrip(".")
        raise DataError(
            f"{path} should hold the same number of columns in every line, all numbers, but {reason}, counted from "
            f"line {first + 1 if first is not None else 1}"
        ) from error
    _check_count(head[:first], len(table), path)
    names = _names(head[:first], separator, table.shape[1], path)
    if names is None:
        return cloud_of_table(table, path, wanted)
    return cloud_of_columns(dict(zip(names, table.T, strict=True)), path, wanted)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _words(line: str, separator: str | None) -> list[str]:
    for mark in COMMENTS:
        line = line.removeprefix(mark)
    return [word.strip() for word in line.strip().split(separator)]


def _is_data(line: str) -> bool:
    """True of a line of several numbers: no comment, no names, no number of points."""
    words = line.replace(",", " ").replace(";", " ").split()
    return len(words) > 1 and not line.startswith(COMMENTS) and _is_number(words[0])


def _check_count(head: list[str], found: int, path: Path) -> None:
    """A line that is one number says how many points follow."""
    for line in head:
        if line.isdecimal() and int(line) != found:
            raise DataError(f"{path} should hold {line} points, as it says, but holds {found}: it is not complete")


def _names(head: list[str], separator: str | None, width: int, path: Path) -> list[str] | None:
    """The names of the columns, or None; raises `DataError` for a first line that can be nothing else and does not fit.

    Comments that are no names are left alone.
    """
    for line in reversed([line for line in head if line and not line.isdecimal()]):
        words = _words(line, separator)
        is_header = len(words) == width and {"x", "y", "z"} <= {column_name(word) for word in words}
        if is_header:
            return words
        if not line.startswith(COMMENTS):
            raise DataError(
                f"{path}: its line {quoted(line)} should name the {width} columns, with x, y and z, or be a comment"
            )
    return None
