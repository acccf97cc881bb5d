"""Pages of which a program writes what stands between two marks, and people all else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from point_peft.errors import PointPeftError


def write_between(path: Path, begin: str, end: str, lines: Iterable[str]) -> None:
    """Put lines between the marks of a page; raises `PointPeftError` if it has not each of them once."""
    old = path.read_text("utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise PointPeftError(
            f"{path} must have the lines {begin!r} and {end!r}, each once: put them where tables belong"
        )
    before, _, rest = old.partition(begin)
    text = "\n".join([begin, "", *lines, "", end])
    path.write_text(before + text + rest.partition(end)[2], "utf-8")
