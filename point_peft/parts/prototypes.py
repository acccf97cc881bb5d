"""Rows that stand for many: k-means in each class, of rows at hand or of more than memory holds.

Rows are compared by direction (spherical k-means), so they count with unit length, and a centre is the sum of its
members, scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from point_peft.errors import AdapterError

# Rows that are widened to float32 and compared at a time, about 3 MB of them: what lies in a core's cache is read five
# times as fast, and memory stays bounded whatever the size of the bank.
CHUNK_ROWS = 2048
ITERATIONS = 25
Sums = Mapping[int, Tensor]
"""Class -> the sums (k, c) of the members of its prototypes: these scaled, and as long as they have many members."""


def check_lengths(features: Tensor) -> None:
    """Raise `AdapterError` unless every row of features (n, c) has a direction."""
    # In chunks, because a copy in float32 may be twice the size of a bank that just fits into memory.
    for part in torch.split(features, CHUNK_ROWS):
        norms = part.float().norm(dim=1)
        if not bool((norms.isfinite() & (norms > 0)).all()):
            raise AdapterError("every row of a memory bank must be finite and not zero")


def prototypes(features: Tensor, labels: Tensor | None, size: int, *, iterations: int = ITERATIONS) -> Tensor:
    """`size` rows that stand for features (n, c): k-means in each class, with as equal a share for each as can be.

    Deterministic: the first centres of a class are farthest points of its features, beginning with its first.
    """
    if size >= len(features):
        return features
    groups = [features] if labels is None else [features[labels == label] for label in torch.unique(labels)]
    shares = _shares([len(group) for group in groups], size, len(features))
    return torch.cat([_k_means(group, share, iterations) for group, share in zip(groups, shares, strict=True)])


def reduced(sums: Sums, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """The same of `rows` that are already in prototypes, each of which counts as its members: at most `size`.

    Gives them (size, c), of unit length, and the class (size,) of each.
    """
    labels = sorted(sums)
    shares = _shares([len(sums[label]) for label in labels], size, rows)
    merged = [_merged(sums[label], share) for label, share in zip(labels, shares, strict=True)]
    classes = torch.tensor(labels).repeat_interleave(torch.tensor([len(part) for part in merged]))
    return nn.functional.normalize(torch.cat(merged), dim=1), classes


def joined(sums: Iterable[Sums]) -> dict[int, Tensor]:
    """The prototypes of several shards of the rows, side by side in each class."""
    found: dict[int, list[Tensor]] = {}
    for shard in sums:
        for label, rows in shard.items():
            found.setdefault(label, []).append(rows)
    return {label: torch.cat(rows) for label, rows in found.items()}


class Stream:
    """Prototypes of rows that come batch after batch, in bounded memory: mini-batch k-means in each class.

    D. Sculley: "Web-Scale K-Means Clustering", WWW 2010: a row moves the centre nearest to it, at a rate of one over
    the number of rows that the centre has had, which is to be the mean of these. The first batch of a class, the larger
    the better, gives its first centres, as `prototypes` finds them; as long as there are too few, so do later ones. A
    class that comes late takes room from the others, so the order of rows counts: it should be shuffled.
    """

    def __init__(self, size: int, most: int) -> None:
        self.size = size
        """Centres that a class has at most; fewer, where classes are so many that all would exceed `most`."""
        self.most = most
        self.sums: dict[int, Tensor] = {}
        self.rows = 0
        """All rows that it has seen."""

    def add(self, features: Tensor, labels: Tensor | None) -> None:
        """Take rows (n, c), of one class each where labels (n,) are given, else all of class 0."""
        check_lengths(features)
        self.rows += len(features)
        features = nn.functional.normalize(features.float(), dim=1)
        if labels is None:
            labels = torch.zeros(len(features), dtype=torch.int64)
        present = torch.unique(labels).tolist()
        room = self._room(len(self.sums.keys() | set(present)))
        self.sums = {label: _merged(held, room) for label, held in self.sums.items()}
        for label in present:
            self.sums[label] = self._added(self.sums.get(label), features[labels == label], room)

    def forget_labels(self) -> None:
        """Let all rows be of one class, 0."""
        rows = [self.sums[label] for label in sorted(self.sums)]
        self.sums = {0: _merged(torch.cat(rows), self._room(1))} if rows else {}

    def _room(self, classes: int) -> int:
        """The centres that each of so many classes may have."""
        return max(1, min(self.size, self.most // classes))

    def _added(self, held: Tensor | None, rows: Tensor, room: int) -> Tensor:
        """The sums of a class, at most `room`, with rows (n, c) of unit length among them."""
        if held is None:
            return _merged(rows, room)
        free = room - len(held)
        held, rows = torch.cat([held, rows[:free]]), rows[free:]
        if len(rows):
            held.index_add_(0, _nearest(rows, nn.functional.normalize(held, dim=1)), rows)
        return held


def _merged(sums: Tensor, count: int) -> Tensor:
    """The sums (k, c) of members, of at most `count` prototypes; those that nothing would be in are left out."""
    if count >= len(sums):
        return sums
    centres = _k_means(sums, count, ITERATIONS, weighted=True)
    together = torch.zeros_like(centres).index_add_(0, _nearest(sums, centres), sums)
    return together[together.norm(dim=1) > 0]


def _shares(sizes: list[int], total: int, rows: int) -> list[int]:
    """Number of the `total` rows that each class gets: the same for all, but no more than it has."""
    if total < len(sizes):
        raise AdapterError(
            f"{rows} rows cannot be reduced to {total}: there are {len(sizes)} classes, and each keeps at "
            "least one. Give no labels, or a larger size: build_memory_bank's, or bank_size in the configuration"
        )
    shares = [0] * len(sizes)
    while sum(shares) < min(total, sum(sizes)):
        open_groups = [i for i, size in enumerate(sizes) if shares[i] < size]
        for i in open_groups[: total - sum(shares)]:
            shares[i] += 1
    return shares


def _k_means(features: Tensor, count: int, iterations: int, *, weighted: bool = False) -> Tensor:
    """`count` centres (count, c) of features (n, c), which have weight one or, `weighted`, their lengths."""
    if count >= len(features):
        return features
    unit = nn.functional.normalize(features.float(), dim=1)
    features = features if weighted else unit
    centres = unit[_least_alike(unit, count)]
    for _ in range(iterations):
        sums = torch.zeros_like(centres).index_add_(0, _nearest(unit, centres), features)
        filled = sums.norm(dim=1, keepdim=True) > 0
        moved = torch.where(filled, nn.functional.normalize(sums, dim=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _nearest(features: Tensor, centres: Tensor) -> Tensor:
    """The number (n,) of the centre (k, c) of unit length most like each of features (n, c)."""
    return torch.cat([(part @ centres.T).argmax(dim=1) for part in torch.split(features, CHUNK_ROWS)])


def _least_alike(features: Tensor, count: int) -> Tensor:
    """Indices (count,) of features (n, c) of unit length: the first, then each the farthest from those before it."""
    index = torch.zeros(count, dtype=torch.int64, device=features.device)
    # Of unit vectors the farthest is the one with the least product, which takes half the time of a distance.
    likeness = features @ features[0]
    for step in range(1, count):
        last = likeness.argmin()
        index[step] = last
        torch.maximum(likeness, features @ features[last], out=likeness)
    return index
