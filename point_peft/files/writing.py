"""An adapter as files: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

Reading is strict both ways and checks everything before a model is touched. Writing is atomic: the tensors and their
configuration are one adapter, so the tensors' file carries the digest of its configuration, and a new configuration
lies beside the old one until the tensors have been replaced. Whenever the process dies, a reader finds a complete
adapter, the old one or the new. The tensors' file carries its own digest too, because a changed value would go unseen.
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from point_peft.errors import AdapterFileError
from point_peft.files.format import (
    CARD_FILE,
    CONFIG_FILE,
    DIGEST,
    KEY_PREFIX,
    LEFTOVER,
    MAX_HEADER_BYTES,
    PENDING_CONFIG_FILE,
    RECORD,
    SEAL,
    TENSOR_FILE,
    Card,
    metadata_of,
    parse_header,
    read_folder,
    read_pair,
    seal_of,
    sha256,
)
from point_peft.files.tensors import check_finite, unshared

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where saves of several processes into one folder are not kept apart
    fcntl = None


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: Card,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter into a folder, which is made if need be; other files in it stay. Complete or not at all.

    The `record` is what a configuration in PEFT's format cannot say. It goes where PEFT does not look: into the header
    of the tensors' file.
    """
    text = (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    plain = unshared({KEY_PREFIX + name: tensor for name, tensor in sorted(tensors.items())})
    check_finite(plain, "the adapter")
    metadata = {"format": "pt", DIGEST: sha256(text)}
    if record is not None:
        metadata[RECORD] = json.dumps(record, sort_keys=True, ensure_ascii=False)
    data = _sealed(safetensors.torch.save(plain, metadata=metadata))
    _replace_adapter(folder, text, data, card)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy an adapter's configuration and tensors, byte for byte, into a folder. Complete or not at all."""
    read_folder(source)
    text, data, _ = read_pair(source)
    _replace_adapter(folder, text, data, None)


def _replace_adapter(folder: Path, text: bytes, data: bytes, card: Card | None) -> None:
    try:
        if folder.exists() and not folder.is_dir():
            raise AdapterFileError(f"cannot save to '{folder}': it is not a folder")
        made = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _alone(folder):
                _settle(folder)
                _replace_files(folder, text, data, card)
        except BaseException:
            if made:
                with suppress(OSError):  # another process has put something into it
                    folder.rmdir()
            raise
    except OSError as error:
        raise AdapterFileError(f"cannot save to '{folder}': {error.strerror or error}") from error


def _sealed(data: bytes) -> bytes:
    """A safetensors file with its own digest in its metadata.

    And with its header sorted: safetensors writes the metadata in an order that changes.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    parsed = json.loads(data[8:start])
    parsed["__metadata__"][SEAL] = seal_of(parsed, memoryview(data)[start:])
    header = json.dumps(parsed, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes that save into the folder waiting; at the end, have its entries on the disk."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(folder: Path) -> None:
    """Bring what an interrupted save has left to the state that a reader sees, and remove its temporary files."""
    pending = folder / PENDING_CONFIG_FILE
    if pending.is_file():
        stated = _stated_digest(folder / TENSOR_FILE)
        config = folder / CONFIG_FILE
        current = sha256(config.read_bytes()) if config.is_file() else None
        if stated is not None and current != stated == sha256(pending.read_bytes()):
            os.replace(pending, config)
        else:
            pending.unlink()
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            path.unlink()


def _stated_digest(path: Path) -> str | None:
    """The digest of its configuration that a file of tensors states; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES))
    try:
        return metadata_of(parse_header(start, path)).get(DIGEST)
    except AdapterFileError:
        return None


def _replace_files(folder: Path, text: bytes, data: bytes, card: Card | None) -> None:
    suffix = f".{secrets.token_hex(6)}.tmp"
    temporary = {name: folder / f".{name}{suffix}" for name in (CONFIG_FILE, TENSOR_FILE, CARD_FILE)}
    pending = folder / PENDING_CONFIG_FILE
    readme = None if card is None else _new_card(folder / CARD_FILE, card, len(data))
    done = False
    try:
        _write(temporary[CONFIG_FILE], text)
        _write(temporary[TENSOR_FILE], data)
        if readme is not None:
            _write(temporary[CARD_FILE], readme)
        # The moment that counts is the replacement of the tensors: before it the old configuration fits, after it the
        # pending one does, and the tensors' header says which.
        os.replace(temporary[CONFIG_FILE], pending)
        os.replace(temporary[TENSOR_FILE], folder / TENSOR_FILE)
        done = True
        os.replace(pending, folder / CONFIG_FILE)
        if temporary[CARD_FILE].exists():
            os.replace(temporary[CARD_FILE], folder / CARD_FILE)
    finally:
        for path in [*temporary.values(), *([] if done else [pending])]:
            path.unlink(missing_ok=True)


def _new_card(path: Path, card: Card, size: int) -> bytes | None:
    """The card to write; None: what is there stays, as a link does, whatever it leads to."""
    if not path.exists():
        return card(None, size).encode()
    if path.is_symlink() or not path.is_file():
        return None
    present = path.read_bytes()
    # Bytes that are no text go through as they are.
    new = card(present.decode("utf-8", "surrogateescape"), size).encode("utf-8", "surrogateescape")
    return None if new == present else new


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
