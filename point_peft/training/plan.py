"""Which cloud is in which batch, and where the random numbers of each come from.

Nothing here depends on the number of processes, on those that read ahead, or on what was run before: an epoch's batches
follow from (seed, epoch), a cloud's random numbers from (seed, epoch, cloud), those of a step from (seed, step). So a
training that was killed goes on in the middle of an epoch without any generator's state.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from point_peft.data.augmenting import augment
from point_peft.data.cloud import Sample
from point_peft.errors import PointPeftError

# Streams of random numbers that must not meet.
ORDER, CLOUD, STEP = range(3)


def seed_of(*key: int) -> int:
    """A seed of 32 bits for a key, as unlike those of other keys as can be."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators on the CPU; that of a device is seeded once a step."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The clouds 0 to count - 1, shuffled, in as few and as even batches of at most `batch_size` as can be."""
    order = np.random.default_rng((seed, ORDER, epoch)).permutation(count)
    return [part.tolist() for part in np.array_split(order, -(-count // batch_size))]


def in_order(count: int, batch_size: int) -> list[list[int]]:
    """The clouds 0 to count - 1 in their order, in batches as `epoch_batches` makes them."""
    return [part.tolist() for part in np.array_split(np.arange(count), -(-count // batch_size))]


class Share(NamedTuple):
    """The part of a batch that one process goes through at a time."""

    clouds: list[int]
    sizes: list[int]
    """The number of clouds of this part that each process has."""


def shares(batch: Sequence[int], accumulate: int, rank: int, ranks: int) -> list[Share]:
    """The parts of a batch for one process of `ranks`, of consecutive clouds; joined over all they are the batch."""
    found = []
    for part in np.array_split(np.asarray(batch), accumulate):
        own = np.array_split(part, ranks)
        found.append(Share(own[rank].tolist(), [len(piece) for piece in own]))
    return found


def check_shares(count: int, batch_size: int, accumulate: int, ranks: int) -> None:
    """Raise `PointPeftError` if some process would have no cloud of some batch."""
    if count < 1:
        raise PointPeftError("there are no training clouds")
    smallest = count // -(-count // batch_size)
    if smallest < accumulate * ranks:
        raise PointPeftError(
            f"batches of {smallest} of the {count} training clouds are too small for {ranks} processes that each go "
            f"through theirs in {accumulate} parts: Recipe.batch_size must be {accumulate * ranks} or more, and there "
            "must be as many clouds"
        )


@dataclass(frozen=True)
class Drawn(Dataset[Any]):
    """A data set in training: what is drawn at random for a cloud depends on seed, epoch and cloud alone."""

    clouds: Dataset[Any]
    augmentations: tuple[str, ...]
    seed: int
    normals: tuple[int, ...] | None = None
    """The columns of points that turn with a cloud."""

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        # A data set of the user's may draw from any of the global generators.
        seed_all(seed_of(self.seed, CLOUD, epoch, index))
        sample = self.clouds[index]
        if not self.augmentations:
            return sample
        rng = np.random.default_rng((self.seed, CLOUD, epoch, index))
        if not isinstance(sample, (tuple, list)) or len(sample) < 2 or not isinstance(sample[0], torch.Tensor):
            raise PointPeftError(
                f"Recipe.augment moves samples (points, label, …) with points as a tensor, and this data set gives a "
                f"{type(sample).__name__}: set augment=() and augment in the data set"
            )
        points, label, *rest = sample
        category = rest[0] if rest else torch.tensor(0)
        moved = augment(Sample(points, label, category), self.augmentations, rng, self.normals)
        return moved if isinstance(sample, Sample) else type(sample)((moved.points, moved.label, *rest))


class Places(Sampler[list[tuple[int, int]]]):
    """The batches that a process loads, as (epoch, cloud): those of the rest of an epoch, in parts."""

    def __init__(self, epoch: int, parts: Sequence[Share]) -> None:
        self.epoch = epoch
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([[(self.epoch, cloud) for cloud in part.clouds] for part in self.parts])
