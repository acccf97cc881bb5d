"""Large scenes for segmentation: cut into square columns so that every point is in exactly one piece, and put together
again."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from einops import rearrange

from point_peft.data.cloud import UNKNOWN, Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.codes import codes_in, codes_of
from point_peft.data.options import DataOptions
from point_peft.data.reading import read_cloud
from point_peft.data.splitting import SPLITS
from point_peft.errors import DataError

FILLED = 0.75
"""Of `num_points`, as many are meant to be in a column, so that most columns with more than the mean need no cut."""
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One scene, and the pieces that it is cut into."""

    cloud: Cloud
    """All of it, as it was measured, with numbers of classes as labels."""
    name: str
    """The name of its file, by which it is a group."""
    pieces: tuple[Indices, ...]
    """The points of each piece, as their rows in the scene, sorted; no point is in two."""
    splits: tuple[Split | None, ...]
    """The split of each piece."""
    dropped: int = 0
    """Points that are in no piece: those in the gaps between splits, and those with coordinates that are not finite."""

    def piece(self, number: int) -> Cloud:
        """One piece as a cloud."""
        rows = self.pieces[number]
        return Cloud(
            coordinates=self.cloud.coordinates[rows],
            channels={name: values[rows] for name, values in self.cloud.channels.items()},
            labels=None if self.cloud.labels is None else self.cloud.labels[rows],
            source=f"{self.cloud.source}, piece {number}",
        )

    def together(self, predictions: Iterable[tuple[int, Indices, Indices]]) -> Indices:
        """Labels (n,) of the whole scene from (number of a piece, rows (k,) in that piece, labels (k,) of these rows).

        The rows are those of `prepare`, so that copies that fill up a piece count once. `UNKNOWN` is what none of them
        says anything of.
        """
        labels = np.full(len(self.cloud.coordinates), UNKNOWN, np.int64)
        for number, rows, predicted in predictions:
            own, first = np.unique(rows, return_index=True)
            labels[self.pieces[number][own]] = predicted[first]
        return labels


def read_scenes(paths: Sequence[Path], options: DataOptions) -> tuple[tuple[Scene, ...], tuple[str, ...]]:
    """The scenes of these files, and the classes of their points: those of the options, else the codes that occur.

    Coordinates stay float64. Raises `DataError` for a split that would be empty.
    """
    clouds = [
        read_cloud(path, num_samples=options.num_samples, seed=options.seed, label_field=options.label_field)
        for path in paths
    ]
    found = {code for cloud in clouds for code in codes_in(cloud)}
    codes = codes_of(found, options.classes, paths=paths, source=", ".join(map(str, paths)))
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    scenes = [
        cut_scene(codes.labelled(cloud), name, options, np.random.default_rng((options.seed, number)))
        for number, (cloud, name) in enumerate(zip(clouds, names, strict=True))
    ]
    return tuple(scenes), codes.names


def read_scene(paths: Sequence[Path], options: DataOptions = DataOptions()) -> CloudSet:  # noqa: B008 - it is frozen
    """The pieces of the scenes of these files as one set."""
    return set_of_scenes(*read_scenes(paths, options), options)


def set_of_scenes(scenes: Sequence[Scene], classes: tuple[str, ...], options: DataOptions) -> CloudSet:
    """The pieces of all scenes, one after the other, in their order."""
    entries = [
        Entry(
            read=partial(scene.piece, number),
            source=f"{scene.cloud.source}, piece {number}",
            group=scene.name if split is None else f"{scene.name} {split}",
            split=split,
        )
        for scene in scenes
        for number, split in enumerate(scene.splits)
    ]
    return CloudSet(
        entries=tuple(entries), task="segmentation", classes=classes, preparation=options.preparation, seed=options.seed
    )


def cut_scene(cloud: Cloud, name: str, options: DataOptions, rng: np.random.Generator) -> Scene:
    """The scene with its pieces: each split is cut into square columns, and a column with more than `num_points` points
    at random into as few pieces of one size as hold it."""
    finite = np.asarray(np.isfinite(cloud.coordinates).all(axis=1), np.bool_)
    nowhere = len(finite) - int(finite.sum())
    if nowhere == len(finite):
        raise DataError(f"{cloud.source}: no point has finite coordinates")
    if nowhere:
        warnings.warn(
            f"{cloud.source}: {nowhere} of {len(finite)} points hold NaN or infinity and are in no piece", stacklevel=2
        )
    parts = _parts(cloud, finite, options)
    pieces: list[Indices] = []
    splits: list[Split | None] = []
    for split, rows in parts:
        cut = _pieces(cloud.coordinates[rows, :2], options, cloud.source, rng)
        pieces += [np.sort(rows[piece]) for piece in cut]
        splits += [split] * len(cut)
    return Scene(
        cloud=cloud,
        name=name,
        pieces=tuple(pieces),
        splits=tuple(splits),
        dropped=len(cloud.coordinates) - sum(map(len, pieces)),
    )


def _parts(cloud: Cloud, finite: npt.NDArray[np.bool_], options: DataOptions) -> list[tuple[Split | None, Indices]]:
    """The rows of each split: shares of the points along an axis, without those within half a gap of a boundary."""
    if options.split_along is None:
        return [(None, np.flatnonzero(finite))]
    place = cloud.coordinates[:, "xy".index(options.split_along)]
    held_out = {"val": options.val_share, "test": options.test_share}
    shares = {"train": 1 - sum(held_out.values()), **held_out}
    wanted = [split for split in SPLITS if shares[split] > 0]
    bounds = np.quantile(place[finite], np.cumsum([shares[split] for split in wanted])[:-1])
    in_gap = (np.abs(place[:, None] - bounds) < options.gap / 2).any(axis=1)
    part = np.searchsorted(bounds, place, side="left")
    parts: list[tuple[Split | None, Indices]] = []
    for number, split in enumerate(wanted):
        rows = np.flatnonzero((part == number) & finite & ~in_gap)
        if not len(rows):
            raise DataError(
                f"{cloud.source}: no point is left for {split} along {options.split_along}, from "
                f"{place[finite].min()} to {place[finite].max()}, with a gap of {options.gap}; choose a smaller gap"
            )
        parts.append((split, rows))
    return parts


def _pieces(
    places: npt.NDArray[np.float64], options: DataOptions, source: str, rng: np.random.Generator
) -> list[Indices]:
    """Rows of places (n, 2), each in exactly one piece."""
    most = options.preparation.num_points
    side = options.tile or _side(places, most, source)
    columns = np.floor((places - places.min(axis=0)) / side).astype(np.int64)
    _, numbers, counts = np.unique(columns, axis=0, return_inverse=True, return_counts=True)
    by_column = np.argsort(rearrange(numbers, "... -> (...)"), kind="stable")
    pieces: list[Indices] = []
    for rows in np.split(by_column, np.cumsum(counts)[:-1]):
        needed = 1 if most is None else math.ceil(len(rows) / most)
        pieces += np.array_split(rng.permutation(rows), needed) if needed > 1 else [rows]
    return pieces


def _side(places: npt.NDArray[np.float64], most: int | None, source: str) -> float:
    """The side of a square that has, in the mean over the area, 3/4 of `most` points; without an area, the length."""
    if most is None:
        raise DataError(f"{source}: without num_points the length of a tile is needed to cut a scene; state tile")
    extent = places.max(axis=0) - places.min(axis=0)
    return float(math.sqrt(extent[0] * extent[1] * FILLED * most / len(places)) or extent.max() or 1.0)
