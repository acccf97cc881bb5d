"""Few-shot tasks: some classes, a few clouds of each to train on; the field's pickles of ModelNet40, and own draws."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from point_peft.data.cloud import Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.sets.files import check_options, needed, prepared_set
from point_peft.data.sets.pickles import read_pickle
from point_peft.errors import DataError, PointPeftError

ORIGIN = "Point-BERT's ModelNetFewshot (https://github.com/lulutang0608/Point-BERT, DATASET.md)"
SPLITS: tuple[Split, ...] = ("train", "test")
NORMALS = ("nx", "ny", "nz")
Points = npt.NDArray[np.float32]


def recognises_few_shot(path: Path) -> bool:
    """True of a pickle, such as `ModelNetFewshot/5way_10shot/0.pkl`."""
    return path.suffix == ".pkl"


def read_few_shot(path: Path, options: DataOptions) -> CloudSet:
    """The clouds of one pickled task, to train on and to test with; classes have numbers for names.

    Only arrays are read: code that a pickle asks to run is refused. Where rows have six numbers, nx, ny and nz are
    channels.
    """
    check_options(options, "few_shot", tasks=["classification"], variants=())
    clouds = _clouds(path)
    entries = [
        Entry(read=partial(_cloud, points, source), source=source, label=label, split=split)
        for split, points, label, source in clouds
    ]
    return prepared_set(entries, options, task="classification", classes=_names(label for _, _, label, _ in clouds))


def convert_pickle(path: Path, out: Path) -> None:
    """Write a pickled task as an NPZ file that can be read without pickle.

    Its arrays are points (m, n, c), labels (m,), split (m,), which is "train" or "test", and class_names. Raises
    `DataError` before anything is written if the clouds are not of one size.
    """
    clouds = _clouds(path)
    shapes = sorted({points.shape for _, points, _, _ in clouds})
    if len(shapes) > 1:
        raise DataError(f"{path} holds clouds {' and '.join(map(str, shapes))}; one array takes clouds of one size")
    labels = np.array([label for _, _, label, _ in clouds], np.int64)
    arrays: dict[str, npt.NDArray[Any]] = {
        "points": np.stack([points for _, points, _, _ in clouds]),
        "labels": labels,
        "split": np.array([split for split, _, _, _ in clouds]),
        "class_names": np.array(_names(labels.tolist())),
    }
    with out.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def draw_few_shot(dataset: CloudSet, ways: int, shots: int, queries: int, seed: int) -> tuple[CloudSet, CloudSet]:
    """A task drawn from a set: of `ways` classes, `shots` clouds each to train on, and `queries` others to test with.

    The support has the split train, the queries test, and classes are renumbered in the order of the set. Where the set
    states splits, the support comes from its training and the queries from its test; else, where it has groups, each
    from one half of these. Raises `PointPeftError` if too few classes have that many clouds.
    """
    if dataset.task != "classification":
        raise PointPeftError(f"few-shot tasks are drawn from sets for classification; this one is for {dataset.task}")
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        if value < 1:
            raise PointPeftError(f"{name} is {value}; allowed: 1 or more")
    rng = np.random.default_rng(seed)
    places = _places(dataset.entries, rng)
    able: list[int] = []
    drawn: dict[int, tuple[list[int], list[int]]] = {}
    for label in range(len(dataset.classes)):
        support = places[0].get(label, [])[:shots]
        query = [place for place in places[1].get(label, []) if place not in support][:queries]
        if len(support) == shots and len(query) == queries:
            able.append(label)
            drawn[label] = support, query
    if len(able) < ways:
        raise PointPeftError(
            f"{len(able)} of {len(dataset.classes)} classes have {shots} clouds to train on and {queries} to test "
            f"with, but ways is {ways}; ask for fewer"
        )
    chosen = sorted(rng.permutation(able)[:ways].tolist())
    support = [place for label in chosen for place in drawn[label][0]]
    query = [place for label in chosen for place in drawn[label][1]]
    return _task(dataset, support, chosen, "train"), _task(dataset, query, chosen, "test")


def _places(entries: Sequence[Entry], rng: np.random.Generator) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The places of entries that may be in the support, and of those that may be queries, in random order, by label."""
    groups = sorted({entry.group for entry in entries if entry.split is None and entry.group})
    first_half = set(rng.permutation(groups)[: (len(groups) + 1) // 2].tolist())
    found: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    for place in rng.permutation(len(entries)).tolist():
        entry = entries[place]
        for role, split in enumerate(SPLITS):
            in_half = not entry.group or (entry.group in first_half) == (split == "train")
            if entry.label is not None and (entry.split == split or (entry.split is None and in_half)):
                found[role].setdefault(entry.label, []).append(place)
    return found


def _task(dataset: CloudSet, places: Sequence[int], chosen: Sequence[int], split: Split) -> CloudSet:
    part = dataset.subset(places)
    entries = [
        replace(entry, label=chosen.index(entry.label), split=split)
        for entry in part.entries
        if entry.label is not None
    ]
    classes = tuple(dataset.classes[label] for label in chosen)
    return replace(part, entries=tuple(entries), classes=classes, _kept={})


def _clouds(path: Path) -> list[tuple[Split, Points, int, str]]:
    """Split, points (n, 3 or 6), label and source of each cloud of a pickled task."""
    task = read_pickle(needed(path, "the train and test clouds of a task", ORIGIN))
    return [cloud for split in SPLITS for cloud in _clouds_of(task, split, path)]


def _clouds_of(task: Any, split: Split, path: Path) -> Iterator[tuple[Split, Points, int, str]]:
    form = "{'train': [(points, label, …), …], 'test': …}, with points (n, 3 or 6)"
    if not isinstance(task, dict) or not isinstance(task.get(split), list):
        raise DataError(f"{path} should hold {form}, but has no list {split!r}")
    for number, item in enumerate(task[split]):
        source = f"{path}[{split}][{number}]"
        try:
            points, label = np.asarray(item[0], np.float32), int(np.asarray(item[1], np.int64).item())
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise DataError(f"{source} should be points and a label, as in {form}: {error}") from error
        if points.ndim != 2 or points.shape[1] not in (3, 6) or label < 0:
            raise DataError(f"{source} has points {points.shape} and label {label}; it should be as in {form}")
        yield split, points, label, source


def _names(labels: Any) -> tuple[str, ...]:
    return tuple(str(number) for number in range(max(labels, default=0) + 1))


def _cloud(points: Points, source: str) -> Cloud:
    channels = dict(zip(NORMALS, points[:, 3:].T, strict=False))
    return Cloud(coordinates=points[:, :3].astype(np.float64), channels=channels, source=source)
