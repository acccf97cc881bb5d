"""Folders of classes: one folder a class, in folders of splits or without."""

from functools import partial
from pathlib import Path

from point_peft.data.cloud import Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.reading import READERS, read_cloud
from point_peft.data.splitting import SPLIT_NAMES
from point_peft.errors import DataError, nearest_names

NOTES = ("readme", "license", "licence", "copying", "notice", "citation", "changelog")
"""Beginnings of names of files, in lower case, that are for people wherever they lie."""
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
TEXTS = (".txt", ".md", ".csv", ".json", ".yaml", ".yml", ".pdf", ".html", ".log")
"""Files of these suffixes beside the folders, where no class tells of them, are lists and notes, no clouds."""
FORM = "train/CLASS/FILES, test/CLASS/FILES and, if there is, val/CLASS/FILES, or CLASS/FILES"


def read_class_folder(path: Path, options: DataOptions = DataOptions()) -> CloudSet:  # noqa: B008 - it is frozen
    """The clouds of a folder of classes, which are the names of its folders, sorted.

    Without folders of splits the entries have none. Hidden files, notes such as README and LICENSE, and texts beside
    the folders are no data; anything else that is not understood is an error. Raises `DataError` too for classes that
    training lacks.
    """
    if options.task == "segmentation":
        raise DataError(
            f"{path} is a folder of classes, which says nothing of points; for segmentation write a manifest without "
            "labels, and have the labels in the files"
        )
    folders = _folders(path)
    meant = {name: SPLIT_NAMES.get(name.lower()) for name in folders}
    if not any(meant.values()):
        by_split: dict[Split | None, dict[str, Path]] = {None: folders}
    else:
        by_split = _split_folders(path, folders, meant)
    classes = tuple(sorted({name for folders in by_split.values() for name in folders}))
    entries = [
        Entry(
            read=partial(read_cloud, file, num_samples=options.num_samples, seed=options.seed),
            source=str(file),
            label=classes.index(name),
            split=split,
        )
        for split, folders in by_split.items()
        for name, folder in sorted(folders.items())
        for file in _clouds(folder)
    ]
    return CloudSet(
        entries=tuple(entries),
        task="classification",
        classes=classes,
        preparation=options.preparation,
        seed=options.seed,
    )


def _split_folders(
    path: Path, folders: dict[str, Path], meant: dict[str, Split | None]
) -> dict[Split | None, dict[str, Path]]:
    by_split: dict[Split | None, dict[str, Path]] = {}
    for name, folder in folders.items():
        split = meant[name]
        if split is None or split in by_split:
            other = "no split" if split is None else f"a second folder for {split}"
            raise DataError(f"{folder} is {other}, beside folders of splits; {path} should hold {FORM}")
        by_split[split] = _folders(folder)
    if "train" not in by_split:
        raise DataError(f"{path} has {' and '.join(sorted(folders))}, but no train; it should hold {FORM}")
    for split, classes in by_split.items():
        for name in sorted(set(classes) - set(by_split["train"])):
            near = nearest_names(name, sorted(by_split["train"]), what="class")
            raise DataError(f"{path}: class {name!r} is in {split}, but not in train; nearest there: {near}")
    return by_split


def note_free(folder: Path) -> list[Path]:
    """The contents of a folder, sorted, without hidden files and notes."""
    named = sorted((entry.name.lower(), entry) for entry in folder.iterdir())
    return [entry for name, entry in named if not name.startswith((".", *NOTES)) and name not in SYSTEM_FILES]


def _folders(path: Path) -> dict[str, Path]:
    """The folders in a folder, by name; raises `DataError` where there are none, or clouds lie beside them."""
    entries = note_free(path)
    loose = [entry for entry in entries if not entry.is_dir() and entry.suffix.lower() not in TEXTS]
    folders = {entry.name: entry for entry in entries if entry.is_dir()}
    if not folders or loose:
        what = f"{loose[0].name} and nothing that says its class" if loose else "no folders"
        raise DataError(f"{path} holds {what}; it should hold {FORM}")
    return folders


def _clouds(folder: Path) -> list[Path]:
    """The files of a class, sorted; raises `DataError` where there are none or one is not understood."""
    files = note_free(folder)
    strange = [file.name for file in files if file.is_dir() or file.suffix.lower() not in READERS]
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise DataError(
            f"{folder} should hold files of clouds only ({', '.join(READERS)}), but has {', '.join(strange[:3])}{more}"
        )
    if not files:
        raise DataError(f"{folder} is empty; a class should have at least one file")
    return files
