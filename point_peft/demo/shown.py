"""The cloud of a file as it is shown and answered for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from point_peft.data.cloud import Cloud
from point_peft.data.reading import read_cloud
from point_peft.errors import DataError, PointPeftError

MOST_OF_SCENE = 8_000
"""Points of a scene that are answered for: more would take longer than a second."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownCloud:
    """A cloud, its name, and what was said while it was read."""

    path: Path
    cloud: Cloud
    notes: tuple[str, ...]
    part: str = ""
    """A sentence, where it is a part of what the file holds."""

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    def middle(self) -> ShownCloud:
        """The part of a scene that is answered for: the points nearest its middle, seen from above."""
        places = self.cloud.coordinates
        if len(places) <= MOST_OF_SCENE:
            return self
        finite = np.flatnonzero(np.isfinite(places).all(axis=1))
        distance = np.linalg.norm(places[finite, :2] - np.median(places[finite, :2], axis=0), axis=1)
        rows = np.sort(finite[np.argsort(distance, kind="stable")[:MOST_OF_SCENE]])
        note = f"Of {len(places):,} points, the {len(rows):,} nearest the middle have labels here."
        return replace(self, cloud=self.cloud.part(rows, self.cloud.source), part=note)


def read_shown(path: Path) -> ShownCloud:
    """The cloud of a file; raises `PointPeftError`, which names the file and not the folder where it was put."""
    with noting(path) as notes:
        cloud = read_cloud(path)
    return ShownCloud(path=path, cloud=cloud, notes=tuple(notes))


@contextmanager
def noting(path: Path) -> Iterator[list[str]]:
    """Gather what is said of a file within the block, each sentence once; errors name the file by its name alone.

    Warnings that do not name it are not of it: other threads warn of their own affairs.
    """
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield notes
        except PointPeftError as error:
            raise DataError(without_folder(str(error), path)) from error
    own = (str(warning.message) for warning in said)
    notes += dict.fromkeys(without_folder(text, path) for text in own if str(path) in text)


def without_folder(text: str, path: Path) -> str:
    """A sentence about a file by its name alone: an upload lies in a folder that nobody knows."""
    return text.replace(str(path), path.name)
