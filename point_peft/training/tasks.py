"""Data as a run of the command line uses them: opened and checked, or a few-shot task drawn from them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from point_peft.data.cloud_set import CloudSet
from point_peft.data.manifest import is_manifest
from point_peft.data.opening import open_data
from point_peft.data.options import DataOptions
from point_peft.data.sets.few_shot import draw_few_shot

QUERIES = 20
"""Clouds of a class to test a few-shot task with, where there are so many."""


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A few-shot task: some classes, a few clouds of each to train on."""

    ways: int
    shots: int
    trial: int = 0
    """The seed of the draw."""

    def drawn(self, clouds: CloudSet) -> CloudSet:
        """The clouds of the task: to train on those of the support, to test with as many queries of each class.

        Raises `PointPeftError` where there are too few.
        """
        train, test = (Counter(entry.label for entry in clouds.part(split).entries) for split in ("train", "test"))
        able = sorted((test[label] for label in range(len(clouds.classes)) if train[label] >= self.shots), reverse=True)
        queries = min(QUERIES, able[self.ways - 1]) if len(able) >= self.ways else 1
        support, query = draw_few_shot(clouds, self.ways, self.shots, max(queries, 1), self.trial)
        entries, numbers = (*support.entries, *query.entries), (*support.numbers, *query.numbers)
        return replace(support, entries=entries, numbers=numbers, _kept={})


def read_data(paths: Sequence[Path], options: DataOptions, skip_bad: bool) -> CloudSet:
    """The clouds at these paths, all of them read once; raises `DataError` for what cannot be used."""
    return open_data(paths, options).checked(skip_bad, _bar)


def _bar(places: Sequence[int]) -> Iterable[int]:
    bar: Iterable[int] = tqdm(places, desc="reading", unit="cloud", disable=None if is_main() else True, leave=False)
    return bar


def is_main() -> bool:
    """True of the process that tells what is going on, of several."""
    return os.environ.get("RANK", "0") == "0"


def listed(paths: Sequence[Path]) -> str:
    """The paths, for a user."""
    return ", ".join(map(str, paths))


def name_of_data(paths: Sequence[Path]) -> str:
    """A name for data: that of their file or folder, and of their folder where they are several or a list."""
    first = paths[0].resolve()
    if first.is_dir():
        return first.name
    return first.parent.name if len(paths) > 1 or is_manifest(first) else first.stem
