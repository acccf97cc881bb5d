"""Codes of points' classes in files, such as 2 for ground, and the numbers of classes that they become."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import UNKNOWN, Cloud
from point_peft.errors import DataError

ASPRS = (
    "never classified",
    "unclassified",
    "ground",
    "low vegetation",
    "medium vegetation",
    "high vegetation",
    "building",
    "low point",
    "model key-point",
    "water",
    "rail",
    "road surface",
    "overlap",
    "wire guard",
    "wire conductor",
    "transmission tower",
    "wire connector",
    "bridge deck",
    "high noise",
)
"""The classes of LAS files by code, as the ASPRS names them."""
LAS = (".las", ".laz")


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Names of classes, and the codes that are of each of them."""

    names: tuple[str, ...]
    codes: tuple[tuple[int, ...], ...]

    def labels(self, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The number of the class of each code; `UNKNOWN` for codes of no class."""
        number_of = {code: number for number, some in enumerate(self.codes) for code in some}
        found, inverse = np.unique(codes, return_inverse=True)
        numbers = np.array([number_of.get(code, UNKNOWN) for code in found.tolist()], np.int64)
        return numbers[inverse]

    def labelled(self, cloud: Cloud) -> Cloud:
        """The cloud with numbers of classes for the codes of its points."""
        return cloud if cloud.labels is None else replace(cloud, labels=self.labels(cloud.labels))


def codes_of(
    found: Iterable[int], chosen: Mapping[str, Sequence[int]] | None, *, paths: Sequence[Path], source: str
) -> Codes:
    """The classes of the codes that occur in files: those that are chosen, else one for each, by code.

    Codes below 0 are of no class. Warns of a chosen class of which nothing occurs; raises `DataError` if that is so of
    all of them.
    """
    occurring = sorted(code for code in set(found) if code > UNKNOWN)
    asprs = all(path.suffix.lower() in LAS for path in paths)
    if chosen is None:
        named = asprs and all(code < len(ASPRS) for code in occurring)
        names = tuple(ASPRS[code] if named else str(code) for code in occurring)
        return Codes(names=names, codes=tuple((code,) for code in occurring))
    absent = [name for name, codes in chosen.items() if not set(codes) & set(occurring)]
    if occurring and len(absent) == len(chosen):
        raise DataError(f"{source}: no point has a code of the classes asked for; there are {_spelled(occurring)}")
    if occurring and absent:
        warnings.warn(
            f"{source}: no point is of class {', '.join(absent)}; there are {_spelled(occurring)}", stacklevel=3
        )
    return Codes(names=tuple(chosen), codes=tuple(tuple(codes) for codes in chosen.values()))


def _spelled(codes: Sequence[int]) -> str:
    return ", ".join(map(str, codes))


def codes_in(cloud: Cloud) -> list[int]:
    """The codes that occur in a cloud, sorted."""
    found: list[int] = [] if cloud.labels is None else np.unique(cloud.labels).tolist()
    return found
