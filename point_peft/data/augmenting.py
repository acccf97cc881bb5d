"""Random changes of samples for training, drawn anew each time a sample is taken."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from point_peft.data.cloud import Sample
from point_peft.errors import PointPeftError, nearest_names, quoted

Change = Callable[[Sample, np.random.Generator, Sequence[int] | None], Sample]
"""From a sample, a source of random numbers and the columns of the normals, if there are any, to a new sample."""
Matrix = npt.NDArray[np.float64]


def augment(
    sample: Sample, names: Sequence[str], rng: np.random.Generator, normals: Sequence[int] | None = None
) -> Sample:
    """A sample changed by the augmentations `names`, one after the other in this order; the given one is not changed.

    `normals` are the numbers of the columns nx, ny, nz, which turn with the points. The labels of points follow them.
    Raises `PointPeftError` for an unknown name before anything is drawn.
    """
    for name in names:
        if name not in AUGMENTATIONS:
            raise PointPeftError(
                f"augmentation {quoted(name)} is unknown; there are {', '.join(AUGMENTATIONS)}; nearest: "
                f"{nearest_names(name, list(AUGMENTATIONS), what='augmentation')}"
            )
    for name in names:
        sample = AUGMENTATIONS[name](sample, rng, normals)
    return sample


def turned(points: Tensor, rotation: Matrix, normals: Sequence[int] | None = None) -> Tensor:
    """Points (n, c) whose coordinates, and normals where there are any, are turned by a rotation (3, 3)."""
    matrix = torch.from_numpy(rotation).to(points)
    result = points.clone()
    result[:, :3] = points[:, :3] @ matrix.T
    if normals is not None:
        columns = list(normals)
        result[:, columns] = points[:, columns] @ matrix.T
    return result


def rotation_about(axis: npt.ArrayLike, angle: float) -> Matrix:
    """The rotation (3, 3) by `angle` radians about a unit vector (3,), counter-clockwise for those it points at."""
    x, y, z = np.asarray(axis, np.float64)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation: Matrix = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    return rotation


def random_direction(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A unit vector (3,), each direction as likely as another."""
    vector = rng.normal(size=3)
    direction: npt.NDArray[np.float64] = vector / np.linalg.norm(vector)
    return direction


def random_rotation(rng: np.random.Generator) -> Matrix:
    """A rotation (3, 3), uniform over all of them: a normally distributed quaternion has no preferred direction."""
    w, x, y, z = rng.normal(size=4)
    angle = 2 * np.arctan2(np.linalg.norm((x, y, z)), w)
    return rotation_about(np.array([x, y, z]) / np.linalg.norm((x, y, z)), angle)


def _none(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    return sample


def _scale_translate(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Scale each axis by 2/3 to 3/2 and shift it by -0.2 to 0.2; normals stay at right angles to the surface."""
    scale = torch.from_numpy(rng.uniform(2 / 3, 3 / 2, 3)).to(sample.points)
    return _scaled(sample, scale, torch.from_numpy(rng.uniform(-0.2, 0.2, 3)).to(sample.points), normals)


def _stretch(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Scale each axis by 0.9 to 1.1, for clouds whose size and place say something, such as those of persons."""
    scale = torch.from_numpy(rng.uniform(0.9, 1.1, 3)).to(sample.points)
    return _scaled(sample, scale, torch.zeros_like(scale), normals)


def _scaled(sample: Sample, scale: Tensor, shift: Tensor, normals: Sequence[int] | None) -> Sample:
    points = sample.points.clone()
    points[:, :3] = points[:, :3] * scale + shift
    if normals is not None:
        columns = list(normals)
        points[:, columns] = nn.functional.normalize(points[:, columns] / scale, dim=1)
    return sample._replace(points=points)


def _rotate_z(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Turn about z by 0 to 360 degrees."""
    return _rotated(sample, rotation_about((0, 0, 1), rng.uniform(0, 2 * np.pi)), normals)


def _rotate_y(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Turn about y, which points up in ModelNet40, ScanObjectNN and ShapeNet, by 0 to 360 degrees."""
    return _rotated(sample, rotation_about((0, 1, 0), rng.uniform(0, 2 * np.pi)), normals)


def _rotate_small(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Turn about a random axis by an angle of normal distribution, 0.06 radians wide, at most 0.18 (10 degrees)."""
    angle = np.clip(rng.normal(0, 0.06), -0.18, 0.18)
    return _rotated(sample, rotation_about(random_direction(rng), float(angle)), normals)


def _rotate(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Turn by any rotation, each as likely as another."""
    return _rotated(sample, random_rotation(rng), normals)


def _rotated(sample: Sample, rotation: Matrix, normals: Sequence[int] | None) -> Sample:
    return sample._replace(points=turned(sample.points, rotation, normals))


def _jitter(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Shift each coordinate of each point by normal noise, 0.01 wide, at most 0.05."""
    points = sample.points.clone()
    points[:, :3] += torch.from_numpy(np.clip(rng.normal(0, 0.01, (len(points), 3)), -0.05, 0.05)).to(points)
    return sample._replace(points=points)


def _dropout(sample: Sample, rng: np.random.Generator, normals: Sequence[int] | None) -> Sample:
    """Replace a share of the points, 0 to 0.875, by the first that is kept; so the number of points stays."""
    dropped = torch.from_numpy(rng.random(len(sample.points)) <= rng.uniform(0, 0.875))
    if dropped.all():
        return sample
    rows = torch.arange(len(dropped)).masked_fill(dropped, int((~dropped).nonzero()[0]))
    return with_rows(sample, rows)


def with_rows(sample: Sample, rows: Tensor) -> Sample:
    """The points `rows` (m,) of a sample, with their labels where each point has one."""
    label = sample.label[rows] if sample.label.ndim else sample.label
    return sample._replace(points=sample.points[rows], label=label)


AUGMENTATIONS: Mapping[str, Change] = {
    "none": _none,
    "scale_translate": _scale_translate,
    "stretch": _stretch,
    "rotate_z": _rotate_z,
    "rotate_y": _rotate_y,
    "rotate_small": _rotate_small,
    "rotate": _rotate,
    "jitter": _jitter,
    "dropout": _dropout,
}
"""Name -> the change; lengths are those of clouds in the unit sphere."""
