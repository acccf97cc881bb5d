"""A trained model on files that people have: a class for each, or a class for each point of each."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from point_peft.data.cloud import UNKNOWN, Cloud, Sample
from point_peft.data.codes import LAS
from point_peft.data.optional import optional
from point_peft.data.options import DataOptions
from point_peft.data.preparing import prepare
from point_peft.data.scenes import Scene, cut_scene
from point_peft.errors import DataError
from point_peft.training.inference import Inference

LEGACY_CODES = 31
"""The highest code of a class in points of formats before 6."""


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained model and the preparation that it was trained with."""

    inference: Inference
    classes: tuple[str, ...]
    options: DataOptions
    codes: Mapping[str, Sequence[int]]
    """Class -> its codes in files; empty where files have none."""

    def classify(self, clouds: Sequence[Cloud]) -> Tensor:
        """The probabilities (b, classes) of clouds, each drawn from as a training cloud is."""
        found = []
        for first in range(0, len(clouds), self.inference.batch_size):
            own = clouds[first : first + self.inference.batch_size]
            samples = [self.sample(cloud, number)[0] for number, cloud in enumerate(own, start=first)]
            found.append(self._scores(samples).softmax(dim=1))
        return torch.cat(found)

    def segment(self, cloud: Cloud, name: str, tile: float | None, category: int = 0) -> npt.NDArray[np.int64]:
        """The class (n,) of each point; points with coordinates that are not finite stay unknown.

        `tile` is the side of the columns that the cloud is cut into; infinite: it is one object.
        """
        scene = self.cut(cloud, name, tile)
        found: list[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        for first in range(0, len(scene.pieces), self.inference.batch_size):
            numbers = range(first, min(first + self.inference.batch_size, len(scene.pieces)))
            prepared = [self.sample(scene.piece(number), number, category) for number in numbers]
            predicted = self._scores([sample for sample, _ in prepared]).argmax(dim=1).cpu().numpy()
            sizes = np.cumsum([len(rows) for _, rows in prepared])[:-1]
            found += list(zip(numbers, (rows for _, rows in prepared), np.split(predicted, sizes), strict=True))
        return scene.together(found)

    def numbered(self, cloud: Cloud) -> npt.NDArray[np.int64] | None:
        """The true class (n,) of each point of a file by its code, for comparison; None where it has no labels."""
        if cloud.labels is None:
            return None
        known = {code: number for number, name in enumerate(self.classes) for code in self.codes.get(name, (number,))}
        found, inverse = np.unique(cloud.labels, return_inverse=True)
        numbers: npt.NDArray[np.int64] = np.array([known.get(code, UNKNOWN) for code in found.tolist()], np.int64)
        return numbers[inverse]

    def cut(self, cloud: Cloud, name: str, tile: float | None) -> Scene:
        """The pieces of a cloud that `segment` answers for, see there."""
        if tile is not None and math.isinf(tile):
            extent = np.ptp(cloud.coordinates[np.isfinite(cloud.coordinates).all(axis=1)], axis=0)
            tile = 2 * float(extent.max()) + 1
        options = replace(self.options, split_along=None, gap=0.0, tile=tile)
        return cut_scene(cloud, lambda: cloud, name, options, np.random.default_rng((self.options.seed, 0)))

    def sample(self, cloud: Cloud, number: int, category: int = 0) -> tuple[Sample, npt.NDArray[np.int64]]:
        """A cloud as the model takes it, the `number`-th of those that are asked for, and the row of each point."""
        rng = np.random.default_rng((self.options.seed, number))
        points, _, rows = prepare(cloud, self.options.preparation, rng)
        size = (len(points),) if self.inference.segmentation else ()
        label = torch.full(size, UNKNOWN)
        return Sample(torch.from_numpy(points), label, torch.tensor(category)), rows

    def _scores(self, samples: Sequence[Sample]) -> Tensor:
        ((_, scores),) = self.inference.predicted(samples, [range(len(samples))])
        return scores


def table(files: Sequence[Path], shares: Tensor, classes: Sequence[str]) -> str:
    """CSV with a row for each file: its class, how sure that is, and the probability of each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", *classes])
    for file, own in zip(files, shares.tolist(), strict=True):
        best = max(range(len(classes)), key=own.__getitem__)
        writer.writerow([str(file), classes[best], f"{own[best]:.4f}", *(f"{share:.4f}" for share in own)])
    return text.getvalue()


def labelled_file(
    source: Path,
    cloud: Cloud,
    labels: npt.NDArray[np.int64],
    classes: Sequence[str],
    codes: Mapping[str, Sequence[int]],
) -> tuple[str, bytes]:
    """The name and the content of a file with the class of each point: LAZ for LAS and LAZ, with all that is in the
    source, and else CSV with x, y, z, label and class."""
    if source.suffix.lower() in LAS:
        las = optional("laspy", "LAS and LAZ files").read(source)
        values = np.array([codes[name][0] if name in codes else i for i, name in enumerate(classes)])
        written = np.asarray(las.classification).astype(np.int64)
        written[labels >= 0] = values[labels[labels >= 0]]
        if las.point_format.id < 6 and written.max(initial=0) > LEGACY_CODES:
            raise DataError(
                f"{source} has point format {las.point_format.id}, which holds codes of classes up to {LEGACY_CODES}, "
                f"and {written.max()} was predicted: convert it to point format 6 or later"
            )
        las.classification = written
        data = io.BytesIO()
        las.write(data, do_compress=True)
        return f"{source.stem}.laz", data.getvalue()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["x", "y", "z", "label", "class"])
    names = [classes[label] if label >= 0 else "" for label in labels.tolist()]
    writer.writerows(zip(*cloud.coordinates.T.tolist(), labels.tolist(), names, strict=True))
    return f"{source.stem}.csv", text.getvalue().encode()
