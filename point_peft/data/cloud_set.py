"""Labelled clouds as a data set of torch, prepared once and kept."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from point_peft.data.cloud import UNKNOWN, CloudBatch, Entry, Sample, Split, Task
from point_peft.data.preparing import Preparation, prepare
from point_peft.errors import DataError, PointPeftError

KEPT_BYTES = 2 << 30
"""Prepared samples are kept in memory up to this many bytes a process."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CloudSet(Dataset[Sample]):
    """Labelled clouds, read when they are asked for and then kept.

    A sample is the same each time: what is drawn at random (points of a larger cloud) is drawn by its place in the
    whole set and by `seed`, not by when it is read.
    """

    entries: tuple[Entry, ...]
    task: Task
    classes: tuple[str, ...]
    """The names of the classes, by label."""
    categories: tuple[str, ...] = ("",)
    """The kinds of objects whose parts are asked for, by number."""
    codes: tuple[tuple[int, ...], ...] = ()
    """The codes in the files that are of each class; empty where files have none."""
    preparation: Preparation = Preparation()  # noqa: RUF009 - it is frozen
    seed: int = 0
    numbers: tuple[int, ...] = ()
    """The places of the entries in the whole set; empty: 0, 1, 2 …"""
    _kept: dict[int, Sample] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        number = self.numbers[index] if self.numbers else range(len(self.entries))[index]
        sample = self._kept.get(number)
        if sample is None:
            sample = self._prepared(self.entries[index], number)
            if len(self._kept) * sum(t.nbytes for t in sample) < KEPT_BYTES:
                self._kept[number] = sample
        return sample

    def _prepared(self, entry: Entry, number: int) -> Sample:
        points, labels, rows = prepare(entry.read(), self.preparation, np.random.default_rng((self.seed, number)))
        if self.task == "classification":
            label = torch.tensor(UNKNOWN if entry.label is None else entry.label)
        else:
            label = torch.full((len(points),), UNKNOWN)
            if labels is not None:
                # Copies that fill up a cloud count once, in loss and figures: else a piece of one point is 2048.
                _, first = np.unique(rows, return_index=True)
                label[first] = torch.from_numpy(labels[first])
        self._check_labels(label, entry)
        return Sample(torch.from_numpy(points), label, torch.tensor(entry.category))

    def _check_labels(self, label: Tensor, entry: Entry) -> None:
        wrong = label[(label < UNKNOWN) | (label >= len(self.classes))]
        if len(wrong.reshape(-1)):
            raise DataError(
                f"{entry.source}: label {int(wrong.reshape(-1)[0])} is none of the {len(self.classes)} classes, 0 to "
                f"{len(self.classes) - 1}; {UNKNOWN} means unknown"
            )

    def subset(self, indices: Iterable[int]) -> CloudSet:
        """The entries at these places, which stay what they are."""
        chosen = list(indices)
        numbers = self.numbers or tuple(range(len(self.entries)))
        return replace(
            self,
            entries=tuple(self.entries[index] for index in chosen),
            numbers=tuple(numbers[index] for index in chosen),
        )

    def part(self, split: Split) -> CloudSet:
        """The entries of one split."""
        return self.subset(index for index, entry in enumerate(self.entries) if entry.split == split)

    def prepared(self, preparation: Preparation) -> CloudSet:
        """The same clouds, prepared in another way."""
        return replace(self, preparation=preparation, _kept={})

    def counts(self) -> dict[str, int]:
        """Class -> the number of clouds, or of points, that are of it; reads everything."""
        found: Counter[int] = Counter()
        for index in range(len(self)):
            values, counts = torch.unique(self[index].label, return_counts=True)
            found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        return {name: found[number] for number, name in enumerate(self.classes)}

    def checked(self, skip_bad: bool = False, progress: Callable[[Sequence[int]], Iterable[int]] = iter) -> CloudSet:
        """Read everything once, so that what is wrong is found before a training; with `skip_bad`, leave that out.

        Raises `DataError` for the first bad file, or, with `skip_bad`, if nothing is left.
        """
        good: list[int] = []
        bad: list[str] = []
        for index in progress(range(len(self))):
            try:
                self[index]
            except PointPeftError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
                warnings.warn(f"left out: {error}", stacklevel=2)
            else:
                good.append(index)
        if bad and not good:
            raise DataError(f"none of the {len(bad)} clouds can be used; the first: {bad[0]}")
        return self.subset(good) if bad else self


def collate(samples: Sequence[Sample]) -> CloudBatch:
    """One batch of samples, which must be of one size."""
    sizes = {tuple(sample.points.shape) for sample in samples}
    if len(sizes) > 1:
        raise DataError(
            f"clouds of one batch have {' and '.join(map(str, sorted(sizes)))} points and channels: set num_points, or "
            "for a model that takes packed clouds give fit a collate of your own"
        )
    points, labels, categories = (torch.stack(list(column)) for column in zip(*samples, strict=True))
    return CloudBatch(points, labels, categories)
