"""The sets and how they are split; each is opened once, and a run gets the clouds that its seed draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.accuracy.protocol import Protocol
from point_peft.data.cloud import Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation
from point_peft.data.splitting import SPLITS
from point_peft.errors import PointPeftError, nearest_names, quoted
from point_peft.quickstart.data import load_digits_clouds
from point_peft.training.tasks import FewShot, listed, read_data

PERSONS = ("1", "2", "3", "4")
PEOPLE = tuple(f"mars-p{person}" for person in PERSONS)
"""Mars with one person left out: that one is the test, the next one validation."""
SETS = ("digits", "radhar", "mars")
FILES = Path(__file__).resolve().parents[2].parent / "shared" / "data"
"""Where the radar recordings lie, beside the project."""
OWN = "data"
"""The name of the user's own set."""
FEW_SHOT_SETS = {"digits": "digits", "mars": "mars-p3"}
"""Set -> what its few-shot tasks are drawn from; person 4 lacks a movement, and 10 ways need all."""
SHOTS = 10
# A person among clutter: the median is in the person, and what is far from it is not. Of reaches of 1.5, 2 and 3 metres
# these are the best for a converged probe on the frozen features, by validation.
RADHAR_PREPARATION = Preparation(centre="median", reach=2.0, scale=2.0)
MARS_PREPARATION = Preparation(centre="median", reach=1.5, scale=1.5)


class Parts(NamedTuple):
    """The clouds of one run."""

    train: CloudSet
    val: CloudSet
    test: CloudSet


@dataclass(frozen=True, kw_only=True)
class Sets:
    """All sets that a comparison may ask for, opened when they are asked for and then kept."""

    radhar: Path
    mars: Path
    own: Sequence[Path] = ()
    """The user's data, opened with `options`."""
    options: DataOptions = DataOptions()  # noqa: RUF009 - it is frozen
    _open: dict[str, CloudSet] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """The tasks that there are."""
        return [*SETS, *PEOPLE, *([OWN] if self.own else [])]

    def clouds(self, name: str) -> CloudSet:
        """A set with its splits."""
        if name not in self._open:
            self._open[name] = self._opened(name)
        return self._open[name]

    def check(self, name: str) -> str:
        """The name of a task; raises `PointPeftError` if it is none."""
        if name not in self.names():
            near = nearest_names(name, self.names(), what="task")
            raise PointPeftError(f"no task is called {quoted(name)}; nearest: {near}")
        return name

    def parts(self, name: str, protocol: Protocol, seed: int) -> Parts:
        """The clouds of a run: the training is drawn by the seed, validation and test are the same for all seeds."""
        clouds = self.clouds(name)
        return Parts(
            some(clouds.part("train"), protocol.train_clouds, seed),
            some(clouds.part("val"), protocol.val_clouds, 0),
            some(clouds.part("test"), protocol.test_clouds, 0),
        )

    def few_shot(self, name: str, ways: int, seed: int) -> Parts:
        """An episode: a few clouds of some classes to train on, others of these to test with, and no validation."""
        drawn = FewShot(ways=ways, shots=SHOTS, trial=seed).drawn(self.clouds(FEW_SHOT_SETS.get(name, name)))
        return Parts(drawn.part("train"), drawn.part("val"), drawn.part("test"))

    def _opened(self, name: str) -> CloudSet:
        if name == "digits":
            return digits()
        if name == OWN:
            clouds = read_data(self.own, self.options, False)
            if clouds.task != "classification" or not all(len(clouds.part(split)) for split in SPLITS):
                raise PointPeftError(
                    f"{listed(self.own)}: a comparison needs training, validation and test of whole clouds"
                )
            return clouds
        if name == "radhar":
            return read_data(
                [self.radhar], DataOptions(group="recording", val_share=0.2, preparation=RADHAR_PREPARATION), False
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the split (val|train) has no cloud")  # person 4 lacks a movement
            return read_data([self.mars], mars_options(name), False)


def mars_options(name: str) -> DataOptions:
    """The persons of each split: the fixed ones, or one left out."""
    test = 3 if name == "mars" else PEOPLE.index(name)
    val = 2 if name == "mars" else (test + 1) % len(PERSONS)
    train = [person for number, person in enumerate(PERSONS) if number not in (val, test)]
    return DataOptions(
        group="subject",
        train_groups=train,
        val_groups=[PERSONS[val]],
        test_groups=[PERSONS[test]],
        preparation=MARS_PREPARATION,
    )


def digits() -> CloudSet:
    """The lifted digits, which need no file."""
    drawn = load_digits_clouds()
    splits: dict[Split, tuple[Tensor, Tensor]] = {"train": drawn.train, "val": drawn.val, "test": drawn.test}
    entries = [
        Entry(read=_reader(cloud), source=f"digits {split} {number}", label=int(label), split=split)
        for split, (points, labels) in splits.items()
        for number, (cloud, label) in enumerate(zip(points, labels, strict=True))
    ]
    preparation = Preparation(centre="none", scale="none")
    return CloudSet(
        entries=tuple(entries), task="classification", classes=drawn.class_names, preparation=preparation
    ).checked()


def _reader(points: Tensor) -> Callable[[], Cloud]:
    return partial(Cloud, coordinates=points.double().numpy())


def some(clouds: CloudSet, most: int, seed: int) -> CloudSet:
    """At most so many clouds, drawn by the seed; 0: all."""
    order = np.random.default_rng(seed).permutation(len(clouds))
    return clouds.subset(order[: most or None].tolist())
