"""Lists of files with their labels and splits: CSV, or JSON, a list of objects."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from point_peft.data.cloud import Cloud, Entry, Split, Task
from point_peft.data.cloud_set import CloudSet
from point_peft.data.codes import Codes, codes_in, codes_of
from point_peft.data.options import DataOptions
from point_peft.data.reading import known_suffix, read_cloud
from point_peft.data.splitting import SPLIT_NAMES
from point_peft.errors import DataError, nearest_names, quoted

COLUMNS = ("file", "label", "split", "group", "category")
FORM = "a row for each file, with the columns file and, where they are known, label, split, group and category"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a list: its place in it, for errors, and its columns as text, "" where they say nothing."""

    place: str
    values: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.values.get(column, "")


def read_manifest(path: Path, options: DataOptions = DataOptions()) -> CloudSet:  # noqa: B008 - it is frozen
    """The clouds of the files of a list, whose paths are relative to it.

    Labels are names of classes, or numbers, which are names as well: the classes are sorted. Without labels the task is
    segmentation: each file has labels of its points, codes that become classes as in scenes. Raises `DataError` with
    the row for columns, files and splits that are not what they should be.
    """
    rows = _rows(path, options.group)
    for column in ("label", "split", "category"):
        _check_all_or_none(path, rows, column)
    _check_files(path, rows)
    files = [path.parent / row["file"] for row in rows]
    has_labels = any(row["label"] for row in rows)
    task: Task = options.task or ("classification" if has_labels else "segmentation")
    if task == "segmentation" and has_labels:
        raise DataError(
            f"{path} has labels of whole clouds; for segmentation the labels are in the files, of each point"
        )
    read = partial(read_cloud, num_samples=options.num_samples, seed=options.seed, label_field=options.label_field)
    codes = Codes(names=(), codes=())
    if task == "segmentation":
        found = {code for file in files for code in codes_in(read(file))}
        codes = codes_of(found, options.classes, paths=files, source=str(path))
    classes = _sorted_names(row["label"] for row in rows)
    categories = _sorted_names(row["category"] for row in rows)
    entries = [
        Entry(
            read=partial(_labelled, read, file, codes),
            source=str(file),
            label=classes.index(row["label"]) if row["label"] else None,
            category=categories.index(row["category"]) if row["category"] else 0,
            group=row[options.group or "group"],
            split=_split(path, row),
        )
        for file, row in zip(files, rows, strict=True)
    ]
    return CloudSet(
        entries=tuple(entries),
        task=task,
        classes=classes if task == "classification" else codes.names,
        categories=categories or ("",),
        preparation=options.preparation,
        seed=options.seed,
    )


def is_manifest(path: Path) -> bool:
    """True of a JSON file, and of a CSV file whose first line names a column "file"."""
    if path.suffix.lower() == ".json":
        return True
    if path.suffix.lower() != ".csv":
        return False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return "file" in next(csv.reader(file), [])


def _labelled(read: "partial[Cloud]", file: Path, codes: Codes) -> Cloud:
    return codes.labelled(read(file))


def _rows(path: Path, group: str | None) -> list[Row]:
    """The rows, whose columns are all known."""
    try:
        text = path.read_text("utf-8-sig")
        rows = list(_json_rows(text) if path.suffix.lower() == ".json" else _csv_rows(text))
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); it should hold {FORM}") from error
    known = [*COLUMNS, *([group] if group else [])]
    for row in rows:
        for column in row.values:
            if column not in known:
                near = nearest_names(column, known, what="column")
                raise DataError(f"{path}, {row.place}: the column {quoted(column)} is unknown; nearest: {near}")
        if not row["file"]:
            raise DataError(f"{path}, {row.place}: no file is named; there should be {FORM}")
        if group and group not in row.values:
            raise DataError(f"{path}, {row.place}: there is no column {quoted(group)} to group by")
    if not rows:
        raise DataError(f"{path} has no rows; it should hold {FORM}")
    return rows


def _csv_rows(text: str) -> Iterator[Row]:
    reader = csv.DictReader(text.splitlines(), restkey="", strict=True, skipinitialspace=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if len(set(names)) < len(names):
        raise ValueError("two columns have one name")
    for values in reader:
        place = f"row {reader.line_num}"
        if "" in values or None in values.values():
            raise ValueError(f"{place} has not the {len(names)} columns of the first")
        yield Row(place=place, values={name.strip(): value.strip() for name, value in values.items()})


def _json_rows(text: str) -> Iterator[Row]:
    items = json.loads(text)
    if not isinstance(items, list):
        raise ValueError("it is no list")
    for number, item in enumerate(items, 1):
        plain = isinstance(item, dict) and all(
            isinstance(value, (str, int)) for value in item.values() if value is not None
        )
        if not plain:
            raise ValueError(f"item {number} should be an object of texts and whole numbers, but is {quoted(item)}")
        values = {name: "" if value is None else str(value) for name, value in item.items()}
        yield Row(place=f"item {number}", values=values)


def _check_all_or_none(path: Path, rows: Sequence[Row], column: str) -> None:
    empty = [row for row in rows if not row[column]]
    if empty and len(empty) < len(rows):
        raise DataError(
            f"{path}, {empty[0].place}: it has no {column}, which others have; state it for all or for none"
        )


def _check_files(path: Path, rows: Sequence[Row]) -> None:
    seen: dict[Path, str] = {}
    for row in rows:
        file = path.parent / row["file"]
        known_suffix(file)
        if not file.is_file():
            raise DataError(f"{path}, {row.place}: {file} does not exist; paths are relative to the folder of the list")
        first = seen.setdefault(file.resolve(), row.place)
        if first != row.place:
            raise DataError(f"{path}, {row.place}: {row['file']} stands in {first} already; list each file once")


def _split(path: Path, row: Row) -> Split | None:
    named = row["split"]
    if named and named.lower() not in SPLIT_NAMES:
        raise DataError(f"{path}, {row.place}: the split {quoted(named)} is unknown; known: {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[named.lower()] if named else None


def _sorted_names(names: Iterator[str]) -> tuple[str, ...]:
    """Those that are no "", each once, numbers by size and all else by letters."""
    distinct = {name for name in names if name}
    numbers = all(name.isdecimal() for name in distinct)
    return tuple(sorted(distinct, key=lambda name: (int(name) if numbers else 0, name)))
