"""From a cloud as it was measured to the points that a model takes."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from point_peft.config import check_fields, require
from point_peft.data.cloud import COORDINATES, Cloud
from point_peft.errors import DataError, nearest_names, quoted
from point_peft.schema import FrozenMapping, Limit, at_least

LARGEST = 1e18
"""No coordinate is larger than this: the squares of larger ones do not fit into float32."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A stated way from measured clouds to points (n, c) float32. Travels in a run's folder, as JSON.

    The steps, in this order: rows with NaN or infinity are dropped, the cloud is centred, far points are dropped, it is
    scaled, and num_points of it are chosen. So centre and scale are those of the whole cloud, not of the chosen points.
    """

    num_points: Annotated[int | None, at_least(1)] = 1024
    """Points a cloud, in the order of the file: of more, so many are drawn at random, each at most once; fewer are all
    taken, followed by copies of points drawn at random; labels of copies do not count. None: all."""
    centre: Literal["mean", "median", "ground", "none"] = "mean"
    """"mean", "median", "ground" (mean of x and y, least z) or "none"."""
    scale: str | float = "sphere"
    """"sphere": the farthest point lies at 1, and a cloud at one place stays; "none"; or the length, in the unit of the
    file, that becomes 1."""
    reach: Annotated[float | None, Limit("more than 0, or None", lambda value: value > 0)] = None
    """Points farther than this from the centre, in the unit of the file, are dropped."""
    channels: tuple[str, ...] = COORDINATES
    """The columns of a sample, the coordinates first."""
    channel_scale: Mapping[str, float] = FrozenMapping()
    """Channel -> the value of it, in the unit of the file, that becomes 1, such as {intensity: 255}."""
    most_bad: Annotated[float, Limit("0 to 1", lambda value: 0 <= value <= 1)] = 0.1
    """The share of rows with NaN or infinity up to which these are dropped with a warning; more is an error."""

    def __post_init__(self) -> None:
        check_fields(self)
        scale = self.scale
        lengths = "'sphere', 'none' or a length of more than 0"
        require(scale in ("sphere", "none") if isinstance(scale, str) else scale > 0, self, "scale", lengths)
        for name, value in self.channel_scale.items():
            scaled = name in self.channels[3:] and value > 0
            require(
                scaled, self, "channel_scale", f"numbers above 0 for {', '.join(self.channels[3:]) or 'no channel'}"
            )
        once = len(set(self.channels)) == len(self.channels)
        require(self.channels[:3] == COORDINATES and once, self, "channels", "'x', 'y', 'z', then others, each once")

    @property
    def normals(self) -> tuple[int, ...] | None:
        """The columns of a sample that turn with its cloud; None where it has no normals."""
        names = ("nx", "ny", "nz")
        return tuple(map(self.channels.index, names)) if set(names) <= set(self.channels) else None


class Prepared(NamedTuple):
    """A cloud as a model takes it, and where its points come from."""

    points: npt.NDArray[np.float32]
    """(n, c)"""
    labels: npt.NDArray[np.int64] | None
    """(n,), or None where the cloud has no labels of points."""
    rows: npt.NDArray[np.int64]
    """(n,): the row of the cloud that each point is; a row occurs twice where it was copied."""


def prepare(cloud: Cloud, preparation: Preparation, rng: np.random.Generator) -> Prepared:
    """Points (n, c), labels (n,) of the same points and their rows in the cloud.

    Raises `DataError` for a cloud without points, too many bad rows or a channel that there is not. Dropped bad rows
    are counted in a warning.
    """
    extra = preparation.channels[3:]
    _check(cloud, extra)
    rows = _finite_rows(cloud, extra, preparation.most_bad)
    # Centred before it is rounded: float32 tells apart 6 cm at 850,000 feet, and less than a hair near the origin.
    coordinates = cloud.coordinates[rows] - _centre(cloud.coordinates[rows], preparation.centre)
    distance = np.linalg.norm(coordinates, axis=1)
    if preparation.reach is not None:
        near = distance <= preparation.reach
        rows, coordinates, distance = rows[near], coordinates[near], distance[near]
        if not len(rows):
            raise DataError(
                f"{_name(cloud)}: no point lies within reach={preparation.reach} of the centre "
                f"({preparation.centre}); give a larger reach or another centre"
            )
    chosen = _chosen(len(rows), preparation.num_points, rng)
    columns = coordinates[chosen] / _length(distance, preparation.scale)
    rows = rows[chosen]
    points = np.empty((len(rows), len(preparation.channels)), np.float32)
    points[:, :3] = columns
    for column, name in enumerate(extra, 3):
        points[:, column] = cloud.channels[name][rows] / preparation.channel_scale.get(name, 1.0)
    return Prepared(points, None if cloud.labels is None else cloud.labels[rows], rows)


def _check(cloud: Cloud, extra: tuple[str, ...]) -> None:
    shape = cloud.coordinates.shape
    if len(shape) != 2 or shape[1] != 3:
        raise DataError(f"{_name(cloud)}: coordinates must be (n, 3), got {shape}")
    if not len(cloud.coordinates):
        raise DataError(f"{_name(cloud)} holds no point")
    names = (*COORDINATES, *cloud.channels)
    for name in extra:
        if name not in cloud.channels:
            raise DataError(
                f"{_name(cloud)}: no channel {quoted(name)}; there are {', '.join(names)}; nearest: "
                f"{nearest_names(name, names, what='channel')}"
            )
    columns = {"labels": cloud.labels, **{name: cloud.channels[name] for name in extra}}
    for name, values in columns.items():
        if values is not None and values.shape != shape[:1]:
            raise DataError(f"{_name(cloud)}: {name} must be ({shape[0]},), one for each point, got {values.shape}")


def _finite_rows(cloud: Cloud, extra: tuple[str, ...], most_bad: float) -> npt.NDArray[np.int64]:
    """The rows without NaN and infinity in the coordinates and in the channels that are asked for."""
    finite = np.isfinite(cloud.coordinates).all(axis=1)
    for name in extra:
        finite &= np.isfinite(cloud.channels[name])
    rows, n = np.flatnonzero(finite), len(cloud.coordinates)
    bad = n - len(rows)
    if not len(rows) or bad > most_bad * n:
        raise DataError(
            f"{_name(cloud)}: {bad} of {n} points hold NaN or infinity, more than most_bad={most_bad} allows; "
            "mend the file, or leave it out"
        )
    if bad:
        warnings.warn(f"{_name(cloud)}: {bad} of {n} points hold NaN or infinity and are dropped", stacklevel=3)
    farthest = np.abs(cloud.coordinates[rows]).max()
    if farthest > LARGEST:
        raise DataError(f"{_name(cloud)}: a coordinate of {farthest:.3g} is none; they go up to {LARGEST:.0e}")
    return rows


def _centre(coordinates: npt.NDArray[np.float64], centre: str) -> npt.NDArray[np.float64]:
    """The place (3,) that becomes the origin."""
    if centre == "none":
        return np.zeros(3)
    place: npt.NDArray[np.float64] = np.median(coordinates, axis=0) if centre == "median" else coordinates.mean(axis=0)
    if centre == "ground":
        place[2] = coordinates[:, 2].min()
    return place


def _length(distance: npt.NDArray[np.float64], scale: str | float) -> float:
    """The length that becomes 1."""
    if isinstance(scale, str):
        return float(distance.max() or 1.0) if scale == "sphere" else 1.0
    return scale


def _chosen(n: int, num_points: int | None, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The places of the points that are taken: some of n, or all and copies."""
    if num_points is None:
        return np.arange(n)
    if num_points <= n:
        return np.sort(rng.choice(n, num_points, replace=False))
    return np.concatenate([np.arange(n), rng.integers(n, size=num_points - n)])


def _name(cloud: Cloud) -> str:
    return cloud.source or "the cloud"
