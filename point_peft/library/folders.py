"""The adapters in a folder and below it."""

import os
from collections.abc import Iterator
from pathlib import Path

from point_peft.errors import AdapterFileError
from point_peft.files.format import CARD_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, RUN_FILE, TENSOR_FILE, read_headers
from point_peft.hub.card import tags_of
from point_peft.library.entry import TASKS, Beside, LibraryEntry, Origin, entry_of, of_run, of_tags

CARD_BYTES = 1 << 16
"""Of a card, that much is read: the tags stand at its beginning."""


def adapters_below(root: Path) -> Iterator[LibraryEntry]:
    """Every adapter in a folder and below it, by the headers of its files; one that is not in order says why.

    An adapter is a folder with a configuration or tensors of an adapter. Folders that begin with a dot are left out,
    links to folders are followed, each folder is taken once.
    """
    seen: set[tuple[int, int]] = set()
    left: list[tuple[str, str, str | None]] = [(os.fspath(root), "", None)]
    while left:
        path, name, record = left.pop()
        try:
            stat = os.stat(path)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            files, folders = _listed(path)
        except OSError as error:
            yield LibraryEntry(
                name=name or root.name, origin=Origin(path), broken=f"cannot read '{path}': {error.strerror or error}"
            )
            continue
        # A run with several adapters has all but one of them in folders of its own.
        record = os.path.join(path, RUN_FILE) if RUN_FILE in files else record
        if CONFIG_FILE in files or TENSOR_FILE in files:
            yield adapter_in(path, name or root.name, record, CARD_FILE in files)
        left += [(os.path.join(path, own), f"{name}/{own}".lstrip("/"), record) for own in folders]


def _listed(path: str) -> tuple[set[str], list[str]]:
    """The names of the files and of the folders in a folder."""
    files: set[str] = set()
    folders: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if not _is_folder(entry):
                files.add(entry.name)
            elif not entry.name.startswith("."):
                folders.append(entry.name)
    return files, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def adapter_in(path: str, name: str, record: str | None, card: bool) -> LibraryEntry:
    """The adapter in a folder; `record` is the file of its run, `card`: it has one."""
    try:
        headers = read_headers(Path(path))
        beside = Beside() if record is None else of_run(_beginning(record, MAX_CONFIG_BYTES))
        if beside.task is None and card:
            text = _beginning(os.path.join(path, CARD_FILE), CARD_BYTES).decode("utf-8", "replace")
            if any(task in text for task in TASKS):  # to parse YAML takes longer than all else
                beside = Beside(of_tags(tags_of(text)).task, beside.classes)
        return entry_of(name, Origin(path, marks=headers.stamps), headers, beside)
    except AdapterFileError as error:
        return LibraryEntry(name=name, origin=Origin(path), broken=str(error))


def _beginning(path: str, most: int) -> bytes:
    """The first bytes of a file that may be there; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(most)
    except OSError:
        return b""
