"""The adapters of a collection of the Hub, or of one repository, by ranged reads of their headers.

What a collection held when it was last listed is kept in the cache, so that it can be listed from there where the Hub
cannot be reached: of what was downloaded, by the headers of the files there.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

from point_peft.errors import AdapterFileError, HubError, quoted
from point_peft.files.format import CONFIG_FILE, TENSOR_FILE, Headers
from point_peft.hub.asking import TIMEOUT, Unreachable, ask, first_line, no_hub
from point_peft.hub.pulling import (
    COMMIT,
    LIBRARY,
    LIMITS,
    Place,
    check_names,
    client,
    download,
    fetched,
    is_path,
    is_repo_id,
    model_info,
)
from point_peft.library.entry import LibraryEntry, Origin, entry_of, of_tags
from point_peft.library.folders import adapter_in

_COLLECTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*/[A-Za-z0-9_.\-]+-[0-9a-f]{24}")
_NO_ADAPTER = f"a model without {CONFIG_FILE} and {TENSOR_FILE}"
Found = tuple[list[LibraryEntry], dict[str, str]]
"""Adapters, and what else there is: name -> what it is."""


def is_collection(source: str) -> bool:
    """True if a string is written as collections of the Hub are named."""
    return _COLLECTION.fullmatch(source) is not None and ".." not in source


def adapters_on_hub(source: str, place: Place) -> Found:
    """The adapters of a collection or a repository, of the commits that their branches `main` are at now."""
    check_names(source, None, None, place.token)
    if constants.HF_HUB_OFFLINE:
        return _remembered(source, place, "HF_HUB_OFFLINE is set")
    try:
        if not is_collection(source):
            entries = _in_repository(source, place)
            found: Found = (entries, {} if entries else {source: _NO_ADAPTER})
        else:
            found = _in_collection(source, place)
    except Unreachable as error:
        warning = f"{error}: the list of '{source}' is taken from the cache"
        found = _remembered(source, place, str(error))
        warnings.warn(warning, stacklevel=5)
        return found
    _remember_list(source, place, found)
    return found


def _in_collection(slug: str, place: Place) -> Found:
    entries: list[LibraryEntry] = []
    skipped: dict[str, str] = {}
    for kind, name in _items(slug, place):
        if kind != "model" or not is_repo_id(name):
            skipped[name] = f"a {quoted(kind)[1:-1]}"
            continue
        try:
            own = _in_repository(name, place)
        except (HubError, Unreachable) as error:
            entries.append(LibraryEntry(name=name, origin=Origin(name), broken=str(error)))
            continue
        entries += own
        if not own:
            skipped[name] = _NO_ADAPTER
    return entries, skipped


def _items(slug: str, place: Place) -> list[tuple[str, str]]:
    """(kind, name) of what is in a collection."""

    def listed() -> list[tuple[str, str]]:
        try:
            items = client(place.token).get_collection(slug).items
        except (LookupError, TypeError, AttributeError) as error:
            raise Unreachable(f"{no_hub()}: its answer lacks {first_line(error)}") from error
        return [(str(item.item_type), str(item.item_id)) for item in items]

    try:
        return ask(slug, None, listed)
    except HubError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 404):
            raise HubError(
                f"there is no collection '{slug}' that can be seen: check the name; if it is private, pass a token "
                "that may read it, or run `hf auth login`"
            ) from error
        raise


def _in_repository(repo_id: str, place: Place) -> list[LibraryEntry]:
    """The adapters of a repository, at its root and in folders of it."""
    info = ask(repo_id, None, partial(model_info, repo_id, None, place.token))
    files = {file.rfilename: file for file in info.siblings or ()}
    tags = info.card_data.get("tags") if info.card_data is not None else None
    beside = of_tags(tags if isinstance(tags, list) else ())
    adapters = [path for path in files if path.rpartition("/")[2] in LIMITS and is_path(path)]
    folders = {path.rpartition("/")[0] for path in adapters}
    found = []
    for folder in sorted(folders):
        name = f"{repo_id}/{folder}".rstrip("/")
        own = [files.get(f"{folder}/{file}".lstrip("/")) for file in LIMITS]
        marks = tuple((file.blob_id, file.lfs.sha256 if file.lfs else None) for file in own if file is not None)
        origin = Origin(repo_id, folder or None, str(info.sha), marks)
        try:
            found.append(entry_of(name, origin, _headers(repo_id, str(info.sha), folder, own, place), beside))
        except (AdapterFileError, HubError, Unreachable) as error:
            found.append(LibraryEntry(name=name, origin=origin, broken=str(error)))
    return found


def _headers(repo_id: str, sha: str, folder: str, own: list[Any], place: Place) -> Headers:
    """The headers of an adapter's files: the configuration is downloaded, of the tensors only what describes them."""
    for (name, limit), file in zip(LIMITS.items(), own, strict=True):
        if file is None:
            raise AdapterFileError(f"it has no file '{name}'")
        if file.size is None or file.size > limit:
            raise AdapterFileError(f"its '{name}' has {file.size} bytes, at most {limit:,} are read")
    config, tensors = own
    text = fetched(repo_id, sha, config, place).read_bytes()

    def read() -> Any:
        return client(place.token).parse_safetensors_file_metadata(
            repo_id, tensors.rfilename, revision=sha, timeout=TIMEOUT
        )

    try:
        parsed = ask(repo_id, sha, read)
    except (NotASafetensorsRepoError, SafetensorsParsingError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, HubError):
            raise
        raise AdapterFileError(f"its {TENSOR_FILE} is not a safetensors file: {first_line(error)}") from error
    header = {
        name: {"dtype": one.dtype, "shape": one.shape, "data_offsets": one.data_offsets}
        for name, one in parsed.tensors.items()
    }
    values = max((one.data_offsets[1] for one in parsed.tensors.values()), default=0)
    return Headers(text, {"__metadata__": parsed.metadata, **header}, tensors.size - values, tensors.size, ())


# ---- where the Hub cannot be reached ---------------------------------------------------------------------------------


def _note(source: str, place: Place) -> Path:
    """The file of the cache that says what a collection or a repository held."""
    assets = None if place.cache_dir is None else str(Path(place.cache_dir, "assets"))
    return huggingface_hub.cached_assets_path(LIBRARY, "libraries", source, assets_dir=assets) / "adapters.json"


def _remember_list(source: str, place: Place, found: Found) -> None:
    entries, skipped = found
    held = [[one.name, one.origin.source, one.origin.subfolder, one.origin.commit] for one in entries]
    # A cache may be read-only.
    with suppress(OSError, ValueError):
        note = _note(source, place)
        temporary = note.with_name(f".{note.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"adapters": held, "skipped": skipped}), encoding="utf-8")
        os.replace(temporary, note)


def _remembered(source: str, place: Place, why: str) -> Found:
    """The list of the cache; an adapter that was not downloaded cannot be loaded, which its entry says."""
    try:
        held = json.loads(_note(source, place).read_text("utf-8"))
        skipped = {str(name): str(kind) for name, kind in held["skipped"].items()}
        entries = [
            _from_cache(name, repo_id, subfolder, commit, place, why)
            for name, repo_id, subfolder, commit in held["adapters"]
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise HubError(f"'{source}' is not in the cache, and was not asked for on the Hub: {why}. Try again") from error
    return entries, skipped


def _from_cache(
    name: str, repo_id: str, subfolder: str | None, commit: str | None, place: Place, why: str
) -> LibraryEntry:
    if commit is None or not COMMIT.fullmatch(commit):
        return LibraryEntry(name=name, origin=Origin(repo_id), broken=f"it was not there when it was listed: {why}")
    at = Place(subfolder, commit, place.token, place.cache_dir, local_files_only=True)
    origin = Origin(repo_id, subfolder, commit)
    try:
        folder = download(repo_id, at)
    except HubError as error:
        return LibraryEntry(name=name, origin=origin, broken=str(error))
    return replace(adapter_in(str(folder), name, None, card=False), origin=origin)
