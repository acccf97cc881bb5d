"""Repeatable corruptions of test clouds in five severities: noise, loss, occlusion, rotation and uneven density.

The ideas are those of the field's benchmarks ModelNet40-C and PointCloud-C; the definitions are our own, and figures
are not comparable with theirs. Lengths are those of clouds in the unit sphere.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from point_peft.data.augmenting import random_direction, rotation_about, turned
from point_peft.errors import PointPeftError, nearest_names, quoted

SEVERITIES = (1, 2, 3, 4, 5)

Rows = npt.NDArray[np.int64]
Corruption = Callable[[Tensor, int, np.random.Generator, Sequence[int] | None], tuple[Tensor, Rows]]
"""From points (n, c), a severity, a source of random numbers and the columns of normals, to changed points (n, c) and
the rows of those that are left."""


def corrupt(
    points: Tensor,
    labels: Tensor | None,
    kind: str,
    severity: int,
    rng: np.random.Generator,
    normals: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Points (n, 3 + f) corrupted in one way, and their labels; as many as before, and the given ones are not changed.

    Where points are lost, copies of points that are left, drawn at random, take the last places, so that batches stack.
    `labels` (n,) follow their points; a label () of the whole cloud, and None, stay. `normals` are the numbers of the
    columns nx, ny, nz, which turn with the points. Raises `PointPeftError` for an unknown kind or severity.
    """
    if kind not in CORRUPTIONS:
        raise PointPeftError(
            f"corruption {quoted(kind)} is unknown; there are {', '.join(CORRUPTIONS)}; nearest: "
            f"{nearest_names(kind, list(CORRUPTIONS), what='corruption')}"
        )
    if severity not in SEVERITIES:
        raise PointPeftError(f"severity is {quoted(severity)}; allowed: 1 (least) to 5")
    changed, left = CORRUPTIONS[kind](points, severity, rng, normals)
    rows = torch.from_numpy(np.concatenate([left, rng.choice(left, len(points) - len(left))]))
    return changed[rows], labels[rows] if labels is not None and labels.ndim else labels


def _jitter(
    points: Tensor, severity: int, rng: np.random.Generator, normals: Sequence[int] | None
) -> tuple[Tensor, Rows]:
    """Shift each coordinate of each point by normal noise of width 0.01 * severity."""
    changed = points.clone()
    changed[:, :3] += torch.from_numpy(rng.normal(0, 0.01 * severity, (len(points), 3))).to(points)
    return changed, np.arange(len(points))


def _dropout(
    points: Tensor, severity: int, rng: np.random.Generator, normals: Sequence[int] | None
) -> tuple[Tensor, Rows]:
    """Lose floor(n * share) points, each as likely as another; share = (1 + severity) / 8: 0.25 to 0.75."""
    lost = len(points) * (1 + severity) // 8
    return points, np.sort(rng.permutation(len(points))[lost:])


def _occlusion(
    points: Tensor, severity: int, rng: np.random.Generator, normals: Sequence[int] | None
) -> tuple[Tensor, Rows]:
    """Lose the floor(n * severity / 10) points farthest from a viewer: 10 % to 50 %, a far side that is not seen.

    The viewer stands infinitely far away in a direction d, each as likely as another; the nearness of a point p is d·p.
    """
    lost = len(points) * severity // 10
    return points, np.sort(np.argsort(_along_random_direction(points, rng), kind="stable")[lost:])


def _rotation(
    points: Tensor, severity: int, rng: np.random.Generator, normals: Sequence[int] | None
) -> tuple[Tensor, Rows]:
    """Turn about a random axis, each as likely as another, by 0 to 18 * severity degrees, each as likely as another."""
    axis = random_direction(rng)
    rotation = rotation_about(axis, rng.uniform(0, np.pi / 10 * severity))
    return turned(points, rotation, normals), np.arange(len(points))


def _density(
    points: Tensor, severity: int, rng: np.random.Generator, normals: Sequence[int] | None
) -> tuple[Tensor, Rows]:
    """Lose each point with probability t * (4 + severity) / 10, at most 0.5 to 0.9: fewer and fewer along a direction.

    t is the place of the point in a direction d, each as likely as another: 0 where d·p is least in the cloud, 1 where
    it is greatest. The first point in that direction is never lost.
    """
    place = _along_random_direction(points, rng)
    place -= place.min()
    share = place / (place.max() or 1.0)
    return points, np.flatnonzero(rng.random(len(points)) >= share * (4 + severity) / 10)


def _along_random_direction(points: Tensor, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """The product d·p (n,) of each point p with a random unit vector d."""
    place: npt.NDArray[np.float64] = points[:, :3].double().numpy(force=True) @ random_direction(rng)
    return place


CORRUPTIONS: Mapping[str, Corruption] = {
    "jitter": _jitter,
    "dropout": _dropout,
    "occlusion": _occlusion,
    "rotation": _rotation,
    "density": _density,
}
"""Name -> the corruption."""
