"""Large scenes for segmentation: cut into square columns so that every point is in exactly one piece, and put together
again."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from einops import rearrange

from point_peft.data.cloud import UNKNOWN, Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.codes import Codes, codes_in, codes_of
from point_peft.data.options import DataOptions
from point_peft.data.reading import read_cloud
from point_peft.data.splitting import SPLITS
from point_peft.errors import DataError

FILLED = 0.75
"""Of `num_points`, as many are meant to be in a column, so that most columns with more than the mean need no cut."""
Indices = npt.NDArray[np.int64]
Reader = Callable[[], Cloud]
KEPT_SCENES = 4
"""As many scenes are kept in memory in a process, so that pieces in their order read each scene once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One scene, which is read when it is asked for, and the pieces that it is cut into."""

    read: Reader
    """All of it, as it was measured, with numbers of classes as labels."""
    source: str
    """Its file, for errors and predictions."""
    name: str
    """The name of its file, by which it is a group."""
    size: int
    """The number of its points."""
    pieces: tuple[npt.NDArray[np.int32], ...]
    """The points of each piece, as their rows in the scene, sorted; no point is in two."""
    splits: tuple[Split | None, ...]
    """The split of each piece."""
    dropped: int = 0
    """Points that are in no piece: those in the gaps between splits, and those with coordinates that are not finite."""

    def piece(self, number: int) -> Cloud:
        """One piece as a cloud; the last few scenes that were read for it are kept.

        Raises `DataError` if the scene has another number of points than when it was cut.
        """
        cloud, rows = _kept(self.read), self.pieces[number]
        if len(cloud.coordinates) != self.size:
            raise DataError(
                f"{self.source} has {len(cloud.coordinates)} points, but had {self.size} when it was opened; open it "
                "again"
            )
        return cloud.part(rows, f"{self.source}, piece {number}")

    def entries(self) -> Iterator[Entry]:
        """The pieces as entries of a set, of one group, or of one for each split."""
        for number, split in enumerate(self.splits):
            yield Entry(
                read=partial(self.piece, number),
                source=f"{self.source}, piece {number}",
                group=self.name if split is None else f"{self.name} {split}",
                split=split,
            )

    def together(self, predictions: Iterable[tuple[int, Indices, Indices]]) -> Indices:
        """Labels (n,) of the whole scene from (number of a piece, rows (k,) in that piece, labels (k,) of these rows).

        The rows are those of `prepare`, so that copies that fill up a piece count once. `UNKNOWN` is what none of them
        says anything of.
        """
        labels = np.full(self.size, UNKNOWN, np.int64)
        for number, rows, predicted in predictions:
            own, first = np.unique(rows, return_index=True)
            labels[self.pieces[number][own]] = predicted[first]
        return labels


@lru_cache(KEPT_SCENES)
def _kept(read: Reader) -> Cloud:
    return read()


def read_scenes(paths: Sequence[Path], options: DataOptions) -> tuple[tuple[Scene, ...], Codes]:
    """The scenes of these files, and the classes of their points: those of the options, else the codes that occur.

    Each file is read once to be cut, and again when it is asked for. Coordinates stay float64. Raises `DataError` for a
    split that would be empty.
    """
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    scenes: list[Scene] = []
    found: set[int] = set()
    for number, (path, name) in enumerate(zip(paths, names, strict=True)):
        read = partial(
            read_cloud, path, num_samples=options.num_samples, seed=options.seed, label_field=options.label_field
        )
        cloud = read()
        found.update(codes_in(cloud))
        scenes.append(cut_scene(cloud, read, name, options, np.random.default_rng((options.seed, number))))
    codes = codes_of(found, options.classes, paths=paths, source=", ".join(map(str, paths)))
    return tuple(replace(scene, read=partial(codes.read, scene.read)) for scene in scenes), codes


def read_scene(paths: Sequence[Path], options: DataOptions = DataOptions()) -> CloudSet:  # noqa: B008 - it is frozen
    """The pieces of the scenes of these files as one set."""
    return set_of_scenes(*read_scenes(paths, options), options)


def set_of_scenes(scenes: Sequence[Scene], codes: Codes, options: DataOptions) -> CloudSet:
    """The pieces of all scenes, one after the other, in their order."""
    return CloudSet(
        entries=tuple(entry for scene in scenes for entry in scene.entries()),
        task="segmentation",
        classes=codes.names,
        codes=codes.codes,
        preparation=options.preparation,
        seed=options.seed,
    )


def cut_scene(cloud: Cloud, read: Reader, name: str, options: DataOptions, rng: np.random.Generator) -> Scene:
    """The scene, which `read` gives again, with its pieces, which are kept without the cloud.

    Each split is cut into square columns, and a column with more than `num_points` points at random into as few pieces
    of one size as hold it.
    """
    finite = np.asarray(np.isfinite(cloud.coordinates).all(axis=1), np.bool_)
    nowhere = len(finite) - int(finite.sum())
    if nowhere == len(finite):
        raise DataError(f"{cloud.source}: no point has finite coordinates")
    if nowhere:
        warnings.warn(
            f"{cloud.source}: {nowhere} of {len(finite)} points hold NaN or infinity and are in no piece", stacklevel=2
        )
    parts = _parts(cloud, finite, options)
    pieces: list[npt.NDArray[np.int32]] = []
    splits: list[Split | None] = []
    for split, rows in parts:
        cut = _pieces(cloud.coordinates[rows, :2], options, cloud.source, rng)
        pieces += [np.sort(rows[piece]).astype(np.int32) for piece in cut]
        splits += [split] * len(cut)
    return Scene(
        read=read,
        source=cloud.source,
        name=name,
        size=len(cloud.coordinates),
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
