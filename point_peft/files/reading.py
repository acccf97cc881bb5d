"""Read an adapter's folder, strictly."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from point_peft.errors import AdapterFileError, quoted
from point_peft.files.format import (
    CONFIG_FILE,
    DIGEST,
    KEY_PREFIX,
    LEFTOVER,
    MAX_CONFIG_BYTES,
    MAX_TENSOR_BYTES,
    PEFT_TYPE,
    PENDING_CONFIG_FILE,
    RECORD,
    SEAL,
    TENSOR_FILE,
    AdapterFiles,
    sha256,
)
from point_peft.files.parsing import metadata_of, parse_config, parse_header

_ROUNDS = 10


def seal_of(header: Mapping[str, Any], values: memoryview) -> str:
    """The digest of a safetensors file: of what its header says, but for the digest itself, and of its values."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != SEAL}
    digest = hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    digest.update(values)
    return digest.hexdigest()


def leftovers(folder: Path) -> list[str]:
    """The files that an interrupted save has left in a folder; the next save removes them."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name == PENDING_CONFIG_FILE or LEFTOVER.fullmatch(name))


def read_folder(folder: Path) -> AdapterFiles:
    """Read an adapter's files; whatever is wrong with them raises `AdapterFileError`."""
    try:
        if not folder.is_dir():
            raise AdapterFileError(f"there is no folder '{folder}'")
        text, data, header = read_pair(folder)
    except OSError as error:
        raise AdapterFileError(f"cannot read '{folder}': {error.strerror or error}") from error
    where = f"'{folder / TENSOR_FILE}'"
    try:
        tensors = dict(sorted(safetensors.torch.load(data).items()))
    except KeyError as error:
        raise AdapterFileError(f"{where} has a tensor of an unknown type: {quoted(error.args[0])}") from error
    except (SafetensorError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"{where} is not a safetensors file: {quoted(str(error), 200)[1:-1]}") from error
    metadata = metadata_of(header)
    if SEAL in metadata and metadata[SEAL] != seal_of(
        header, memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    ):
        raise AdapterFileError(
            f"{where} is damaged, or another program has changed it: its digest is not the {SEAL} that its metadata "
            "states; get it again from where it came"
        )
    wrong = [name for name in tensors if not name.startswith(KEY_PREFIX)]
    if wrong:
        raise AdapterFileError(f"{where}: the tensor name {quoted(wrong[0])} does not begin with '{KEY_PREFIX}'")
    config, record = parse_config(text, folder / CONFIG_FILE), None
    if config["peft_type"] != PEFT_TYPE and RECORD in metadata:
        record = parse_config(metadata[RECORD].encode(), folder / TENSOR_FILE)
    return AdapterFiles(
        config=config,
        tensors={name.removeprefix(KEY_PREFIX): tensor for name, tensor in tensors.items()},
        record=record,
        edited=metadata.get(DIGEST) != sha256(text),
    )


def read_pair(folder: Path) -> tuple[bytes, bytes, Any]:
    """The configuration in a folder, the tensors' file and what its header says.

    They are those that belong together, whatever a save does meanwhile.

    A configuration that does not fit the tensors has been edited by hand, and counts; what does not fit shows later.
    """
    for _ in range(_ROUNDS):
        before = _stamps(folder)
        data = _read(folder / TENSOR_FILE, MAX_TENSOR_BYTES)
        header = parse_header(data, folder / TENSOR_FILE)
        digest = metadata_of(header).get(DIGEST)
        text, fits = _config_text(folder, digest)
        # What does not fit while nothing was replaced has been edited by hand.
        if fits or digest is None or _stamps(folder) == before:
            return text, data, header
    raise AdapterFileError(f"cannot read '{folder}': it is being written to all the time")


def _stamps(folder: Path) -> list[tuple[int, int] | None]:
    """Marks by which one sees that a file of a folder is replaced: a save gives each a new inode."""
    stamps: list[tuple[int, int] | None] = []
    for name in (CONFIG_FILE, PENDING_CONFIG_FILE, TENSOR_FILE):
        try:
            stat = (folder / name).stat()
        except FileNotFoundError:
            stamps.append(None)
        else:
            stamps.append((stat.st_ino, stat.st_mtime_ns))
    return stamps


def _config_text(folder: Path, digest: str | None) -> tuple[bytes, bool]:
    """The configuration that goes with the tensors of a folder, the file's or after an interrupted save the pending.

    And whether it is the one that the tensors were saved with.
    """
    text = _read_if_there(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    if digest is not None and (text is None or sha256(text) != digest):
        pending = _read_if_there(folder / PENDING_CONFIG_FILE, MAX_CONFIG_BYTES)
        if pending is not None and sha256(pending) == digest:
            return pending, True
    if text is None:
        raise AdapterFileError(f"there is no file '{folder / CONFIG_FILE}'")
    return text, digest == sha256(text)


def _read(path: Path, limit: int) -> bytes:
    data = _read_if_there(path, limit)
    if data is None:
        raise AdapterFileError(f"there is no file '{path}'")
    return data


def _read_if_there(path: Path, limit: int) -> bytes | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise AdapterFileError(f"'{path}' has {size} bytes, more than the {limit} that are read")
            return file.read()
    except FileNotFoundError:  # a save has just moved it
        return None
