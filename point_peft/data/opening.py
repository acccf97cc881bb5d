"""One door to data of every form: a path is recognised, read and split."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from point_peft.data.array_set import holds_array_set, read_array_set
from point_peft.data.cloud_set import CloudSet
from point_peft.data.folder import note_free, read_class_folder
from point_peft.data.manifest import is_manifest, read_manifest
from point_peft.data.options import DataOptions
from point_peft.data.reading import READERS, known_suffix
from point_peft.data.scenes import read_scene
from point_peft.data.sets import SETS
from point_peft.data.splitting import check_splits, split_by_options
from point_peft.errors import DataError, nearest_names, quoted

LAYOUTS: dict[str, Callable[[Path, DataOptions], CloudSet]] = {
    "folder": read_class_folder,
    "manifest": read_manifest,
    "arrays": read_array_set,
}
"""Name -> the reader of one path; scenes are read from several."""
MEANT_ALWAYS = ("kind", "task", "preparation", "seed", "val_share", "test_share")
NAMED_GROUPS = ("train_groups", "val_groups", "test_groups")
MEANT = {
    "folder": ("num_samples",),
    "manifest": (*NAMED_GROUPS, "group", "classes", "label_field", "num_samples"),
    "arrays": (*NAMED_GROUPS, "group", "label_field"),
    "scene": (*NAMED_GROUPS, "split_along", "gap", "tile", "classes", "label_field", "num_samples"),
}
"""The options that mean something for each layout; the field's sets say so themselves."""
ARRAY_SUFFIXES = (".npz", ".h5", ".hdf5")


def open_data(
    path: Path | str | Sequence[Path | str],
    options: DataOptions = DataOptions(),  # noqa: B008 - it is frozen
) -> CloudSet:
    """The clouds of a folder of classes, a manifest, a file of arrays, some scenes, or one of the field's sets.

    The entries have the splits that the data state or that the options ask for; one scene without `split_along` has
    none. Warns of classes that training or validation lack. Raises `DataError` where nothing is there or it is none of
    those.
    """
    paths = [Path(path)] if isinstance(path, (Path, str)) else [Path(one) for one in path]
    for one in paths:
        if not one.exists():
            raise DataError(f"{one} does not exist; it should be {_known()}")
    kind = _recognised(paths) if options.kind == "auto" else options.kind
    _check_meant(kind, options)
    if kind == "scene":
        files = _files(paths)
        found = read_scene(files, options)
        if len(files) == 1:
            return found
    else:
        found = _layout(kind, paths, options)(paths[0], options)
    if not found.entries:
        raise DataError(f"{paths[0]} holds no cloud; it should be {_known()}")
    split = replace(found, entries=split_by_options(found.entries, options))
    check_splits(split.entries, split.classes)
    return split


def _known() -> str:
    return (
        "a folder of classes, a manifest (CSV with a column file, or JSON), an NPZ or HDF5 file of a whole set, the "
        f"files of one or more scenes ({', '.join(READERS)}), or one of the sets {', '.join(sorted(SETS)) or '(none)'}"
    )


def _check_meant(kind: str, options: DataOptions) -> None:
    """Raise `DataError` for an option that says nothing for data of this kind."""
    unset = DataOptions()
    for item in fields(options) if kind in MEANT else ():
        given = getattr(options, item.name)
        if item.name not in (*MEANT_ALWAYS, *MEANT[kind]) and given != getattr(unset, item.name):
            raise DataError(f"{item.name} is {quoted(given)}, which says nothing for data of kind {kind}; leave it out")
    if kind == "scene" and options.task == "classification":
        raise DataError(
            "task is 'classification', but scenes are for segmentation; put objects into folders of their classes"
        )


def _layout(kind: str, paths: Sequence[Path], options: DataOptions) -> Callable[[Path, DataOptions], CloudSet]:
    if kind not in SETS and kind not in LAYOUTS:
        names = ["auto", "scene", *LAYOUTS, *SETS]
        near = nearest_names(kind, names, what="kind")
        raise DataError(f"kind {quoted(kind)} is unknown; nearest: {near}; known: {', '.join(names)}")
    if len(paths) != 1:
        raise DataError(f"data of kind {kind} are one path, not {len(paths)}; only scenes are several")
    if kind == "folder" and not paths[0].is_dir():
        raise DataError(f"{paths[0]} is a file; data of kind folder are a folder of classes")
    if kind in LAYOUTS and kind != "folder" and paths[0].is_dir():
        raise DataError(f"{paths[0]} is a folder; data of kind {kind} are one file")
    return SETS[kind].read if kind in SETS else LAYOUTS[kind]


def _recognised(paths: Sequence[Path]) -> str:
    """The kind of data that are at these paths."""
    if len(paths) != 1:
        return "scene"
    path = paths[0]
    for name, known in SETS.items():
        if known.recognises(path):
            return name
    if path.is_dir():
        if any(entry.is_dir() for entry in note_free(path)):
            return "folder"
        raise DataError(
            f"{path} has no folders of classes, so its files say nothing of splits and labels; it should be "
            f"{_known()}; for scenes state kind scene"
        )
    if is_manifest(path):
        return "manifest"
    if path.suffix.lower() in ARRAY_SUFFIXES and holds_array_set(path):
        return "arrays"
    known_suffix(path)
    return "scene"


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files of scenes: these, and those in these folders, each of which must be readable."""
    files = [file for path in paths for file in (note_free(path) if path.is_dir() else [path])]
    for file in files:
        if file.is_dir():
            raise DataError(f"{file} is a folder; the files of scenes lie in one")
        known_suffix(file)
    if not files:
        raise DataError(f"no file is in {', '.join(map(str, paths)) or 'the list'}; scenes are files of clouds")
    if len({file.resolve() for file in files}) < len(files):
        raise DataError(f"a file is named twice: {', '.join(map(str, files))}")
    return files
