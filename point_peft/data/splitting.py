"""Splits into training, validation and test that no group straddles: entries of one person or scene stay together."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import Entry, Split
from point_peft.data.options import DataOptions
from point_peft.errors import DataError, nearest_names, quoted

Entries = tuple[Entry, ...]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_NAMES: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), SPLITS[0]),
    **dict.fromkeys(("val", "valid", "validation"), SPLITS[1]),
    **dict.fromkeys(("test", "testing"), SPLITS[2]),
}
"""Names of folders and values of columns, in lower case -> the split that they mean."""
LISTED = 10


def split_by_options(entries: Entries, options: DataOptions) -> Entries:
    """The splits that the options ask for: of named groups, else those that the data state, else drawn by shares.

    Where the data state a training split and no validation, `val_share` of the training is held out; shares of 0 leave
    the data as they are.
    """
    if options.names_groups:
        return split_named(entries, train=options.train_groups, val=options.val_groups, test=options.test_groups)
    stated = {entry.split for entry in entries}
    if None in stated and len(stated) > 1:
        raise DataError("some entries state a split and others none; state it for all of them or for none")
    if None in stated and options.val_share + options.test_share > 0:
        return split_by_groups(entries, val=options.val_share, test=options.test_share, seed=options.seed)
    if "train" in stated and "val" not in stated and options.val_share > 0:
        return with_validation(entries, options.val_share, options.seed)
    return entries


def split_by_groups(entries: Entries, *, val: float = 0.1, test: float = 0.2, seed: int = 0) -> Entries:
    """The same entries with splits drawn at random, whole groups at a time, each class by these shares where it can be.

    An entry without a group is one by itself. Raises `DataError` if there are fewer groups than splits.
    """
    shares = {"train": 1 - val - test, "val": val, "test": test}
    wanted = [split for split in SPLITS if shares[split] > 0]
    places, members = _groups(entries)
    if len(members) < len(wanted):
        raise DataError(
            f"too few groups for a split into {', '.join(wanted)}, none of which may be empty: there is no more than "
            f"{len(members)}; leave out a split by a share of 0, or split by something finer"
        )
    counts = _class_counts(entries, places, len(members))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(members))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    weights = 1 / np.maximum(counts.sum(axis=0), 1)
    # How far each split is below its share, in entries of each class; the last column is of all classes together.
    missing = np.outer([shares[split] for split in wanted], counts.sum(axis=0)).astype(np.float64)
    chosen = np.zeros(len(members), np.int64)
    empty = set(range(len(wanted)))
    for done, group in enumerate(order):
        allowed = sorted(empty) if len(members) - done <= len(empty) else range(len(wanted))
        # What the squares of what is missing, class by class, become less by this group.
        gains = ((2 * missing - counts[group]) * counts[group] * weights**2).sum(axis=1)
        chosen[group] = max(allowed, key=lambda number: gains[number])
        missing[chosen[group]] -= counts[group]
        empty.discard(int(chosen[group]))
    return tuple(replace(entry, split=wanted[chosen[place]]) for entry, place in zip(entries, places, strict=True))


def _groups(entries: Entries) -> tuple[list[int], list[str]]:
    """The number of each entry's group, and the names of the groups, in the order of their first entries."""
    numbers: dict[tuple[str, int], int] = {}
    keys = [(entry.group, 0 if entry.group else place) for place, entry in enumerate(entries)]
    places = [numbers.setdefault(key, len(numbers)) for key in keys]
    return places, [name for name, _ in numbers]


def _class_counts(entries: Entries, places: Sequence[int], groups: int) -> npt.NDArray[np.float64]:
    """Entries of each class, and of all, in each group: (groups, classes + 1)."""
    labels = [-1 if entry.label is None else entry.label for entry in entries]
    _, columns = np.unique(labels, return_inverse=True)
    counts = np.zeros((groups, int(columns.max()) + 2))
    np.add.at(counts, (np.asarray(places), columns), 1)
    counts[:, -1] = counts.sum(axis=1)
    return counts


def split_named(
    entries: Entries, *, train: Sequence[str] = (), val: Sequence[str] = (), test: Sequence[str] = ()
) -> Entries:
    """The same entries with the splits of their groups, which are named; without `train`, that is all the rest.

    Raises `DataError` for a name that no entry has, for a group in two splits, and for entries that are in none.
    """
    existing = list(dict.fromkeys(entry.group for entry in entries))
    if not any(existing):
        raise DataError("the entries have no groups to split by; name the column of the groups (group)")
    named: dict[str, Split] = {}
    for split, groups in zip(SPLITS, (train, val, test), strict=True):
        for group in groups:
            if group not in existing:
                raise DataError(
                    f"{split}: no group is called {quoted(group)}; nearest: "
                    f"{nearest_names(group, existing, what='group')}; there are {_listed(existing)}"
                )
            if named.setdefault(group, split) != split:
                raise DataError(f"group {quoted(group)} is in {named[group]} and in {split}; name it once")
    rest = [group for group in existing if group not in named]
    if train and rest:
        raise DataError(f"the groups {_listed(rest)} are in no split; name them, or leave out train, which is the rest")
    if not train and not rest:
        raise DataError(f"all groups are in val or test, so nothing is left to train on: {_listed(existing)}")
    return tuple(replace(entry, split=named.get(entry.group, "train")) for entry in entries)


def with_validation(entries: Entries, share: float = 0.1, seed: int = 0) -> Entries:
    """The same entries, of which whole groups, this share of the training, are moved from training to validation."""
    training = tuple(entry for entry in entries if entry.split == "train")
    if any(entry.split == "val" for entry in entries):
        raise DataError("the entries have a validation split already")
    if not training:
        raise DataError("no entry is for training, so no validation can be taken out of it")
    _check_groups(entries)  # else it would be told of too few groups, or of validation, which is none of the data's
    divided = iter(split_by_groups(training, val=share, test=0, seed=seed))
    return tuple(next(divided) if entry.split == "train" else entry for entry in entries)


def check_splits(entries: Entries, classes: Sequence[str]) -> None:
    """Check that no group lies in two splits; warn of classes that validation or training lack.

    Entries of segmentation have no label of their own, so that of their classes nothing is known here.
    """
    _check_groups(entries)
    found = {split: Counter(entry.label for entry in entries if entry.split == split) for split in SPLITS}
    labelled = {entry.label for entry in entries if entry.label is not None and entry.label >= 0}
    for split in ("train", "val"):
        lacking = [classes[label] for label in sorted(labelled - set(found[split]))]
        if found[split] and lacking:
            warnings.warn(f"the split {split} has no cloud of {_listed(lacking)}", stacklevel=3)


def _check_groups(entries: Entries) -> None:
    splits_of: dict[str, Split | None] = {}
    for entry in entries:
        if entry.group and splits_of.setdefault(entry.group, entry.split) != entry.split:
            raise DataError(
                f"group {quoted(entry.group)} lies in {splits_of[entry.group]} and in {entry.split} ({entry.source}), "
                "so that one would test what has been trained on; state splits by group"
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(quoted(name) for name in names[:LISTED]) + more
