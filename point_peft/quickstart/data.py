"""Two real data sets as labelled clouds: scikit-learn's digits lifted to 3D, and the RadHAR radar recordings.

digits = load_digits_clouds()               # 1797 clouds of 1024 points, 10 classes; needs no file
radhar = load_radhar("radhar.npz")          # 1664 clouds of 1024 points, 5 activities
points, labels = digits.train               # (m, 1024, 3) float32, (m,) int64
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor

Split = tuple[Tensor, Tensor]  # points (m, n, 3) float32, labels (m,) int64


@dataclass(frozen=True)
class Clouds:
    """A labelled data set in three disjoint splits."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    def subset(
        self, train: int | None = None, val: int | None = None, test: int | None = None, seed: int = 0
    ) -> Clouds:
        """The same with at most so many clouds in each split, drawn at random once."""
        return replace(
            self, train=take(self.train, train, seed), val=take(self.val, val, seed), test=take(self.test, test, seed)
        )

    def relabelled(self, name: str, class_names: tuple[str, ...], table: list[int]) -> Clouds:
        """Another task on the same clouds: label i becomes `table[i]`."""
        new = torch.tensor(table)
        splits = [(points, new[labels]) for points, labels in (self.train, self.val, self.test)]
        return Clouds(name, class_names, *splits)


def unit_sphere(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n, 3) moved to mean zero and scaled so that the largest norm is one."""
    centred = points - points.mean(axis=0)
    return np.asarray(centred / max(float(np.linalg.norm(centred, axis=1).max()), 1e-9))


def take(split: Split, count: int | None, seed: int = 0) -> Split:
    """At most `count` clouds of a split, drawn without replacement."""
    points, labels = split
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels))[:count])
    return points[chosen], labels[chosen]


# --- digits ---


def load_digits_clouds(n: int = 1024, seed: int = 0) -> Clouds:
    """scikit-learn's 8 x 8 digits lifted to clouds of n points, split 60 / 20 / 20 % per class by `seed`."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    points = np.stack([lift(image, n, rng) for image in digits.images])
    part = np.empty(len(points), dtype=np.int64)
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(digits.target == digit))
        part[members] = np.digitize(np.arange(len(members)), [0.6 * len(members), 0.8 * len(members)])
    splits = [to_split(points, digits.target, part == index) for index in range(3)]
    return Clouds("lifted digits", tuple("0123456789"), *splits)


def lift(image: npt.ArrayLike, n: int, rng: np.random.Generator, thickness: float = 2.0) -> npt.NDArray[np.float32]:
    """An image (h, w) as a cloud (n, 3) on the unit sphere.

    A point falls into a pixel with probability proportional to its intensity, anywhere inside the pixel, and anywhere
    along z in a slab whose thickness is proportional to the intensity (`thickness` pixels for the brightest). x is
    right, y is up.
    """
    bright = np.asarray(image, dtype=np.float64)
    height, width = bright.shape
    pixel = rng.choice(bright.size, n, p=bright.ravel() / bright.sum())
    row, column = np.divmod(pixel, width)
    x = column + rng.random(n) - width / 2
    y = height / 2 - row - rng.random(n)
    z = (rng.random(n) - 0.5) * thickness * bright.ravel()[pixel] / bright.max()
    return unit_sphere(np.stack([x, y, z], axis=1)).astype(np.float32)


def parity(digits: Clouds) -> Clouds:
    """The digits as a task of two classes: even or odd."""
    return digits.relabelled("even or odd", ("even", "odd"), [digit % 2 for digit in range(10)])


# --- radar recordings ---


def load_radhar(path: str | Path, seed: int = 0) -> Clouds:
    """RadHAR (nesl/RadHAR, BSD-3-Clause) from an npz file, with the official test split.

    Windows of one recording overlap, so validation takes a fifth of the training *recordings* of each class.
    """
    with np.load(path, allow_pickle=False) as file:
        raw, labels, recording = file["points"], file["labels"].astype(np.int64), file["recording"]
        test, class_names = file["split"] == 1, tuple(str(name) for name in file["class_names"])
    filler, rng = np.random.default_rng(seed), np.random.default_rng(seed)
    points = np.stack([clean(cloud.astype(np.float64), filler) for cloud in raw])
    held_out: list[int] = []
    for label in range(len(class_names)):
        recordings = rng.permutation(np.unique(recording[~test & (labels == label)]))
        held_out.extend(recordings[: len(recordings) // 5])
    val = ~test & np.isin(recording, held_out)
    train = ~test & ~val
    return Clouds("radhar", class_names, *(to_split(points, labels, part) for part in (train, val, test)))


def activity_groups(radhar: Clouds) -> Clouds:
    """The radar recordings as a task of three classes: on the ground, off the ground, moving on."""
    table = {"boxing": 0, "jack": 1, "jump": 1, "squats": 0, "walk": 2}
    names = ("standing", "jumping", "walking")
    return radhar.relabelled("standing, jumping or walking", names, [table[name] for name in radhar.class_names])


def clean(cloud: npt.NDArray[np.float64], rng: np.random.Generator, reach: float = 2.0) -> npt.NDArray[np.float32]:
    """(n, 3) in metres -> (n, 3): centred on the median, within `reach` metres, which become 1.

    Clutter beyond is replaced by copies of nearer points, so that the number of points stays.
    """
    centred = cloud - np.median(cloud, axis=0)
    far = np.linalg.norm(centred, axis=1) > reach
    if far.any():
        centred[far] = centred[rng.choice(np.flatnonzero(~far), int(far.sum()))]
    return (centred / reach).astype(np.float32)


def to_split(points: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], part: npt.NDArray[np.bool_]) -> Split:
    """The clouds of one part of an array as tensors."""
    return torch.from_numpy(points[part]), torch.from_numpy(labels[part])
