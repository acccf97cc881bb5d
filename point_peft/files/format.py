"""An adapter's files: their names, limits and versions, how they are read, strictly, and written, atomically.

The tensors and their configuration are one adapter. So the tensors' file carries the digest of its configuration, and a
new configuration lies beside the old one until the tensors have been replaced: whenever the process dies, a reader
finds a complete adapter, the old one or the new. The tensors' file has its own digest too: a changed value would go
unseen.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from point_peft.config import METHODS, TunerConfig
from point_peft.errors import AdapterFileError, quoted
from point_peft.files.tensors import Tensors, check_finite, unshared
from point_peft.version import __version__

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where saves of several processes into one folder are not kept apart
    fcntl = None
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
RUN_FILE = "run.json"
"""The record of a training, which `point_peft.training` writes beside the adapter that came of it."""
PENDING_CONFIG_FILE = ".adapter_config.json.pending"
FORMAT_VERSION = 1
PEFT_TYPE = "POINT_PEFT"
"""The `peft_type` of our own format; in PEFT's it is the method's, see `methods_of_peft`."""
KEY_PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 1 << 20
MAX_TENSOR_BYTES = 4 << 30
MAX_HEADER_BYTES = 8 << 20
MAX_NESTING = 64
"""No object or list of a configuration lies deeper: what goes through it must not run out of stack."""
_ROUNDS = 10
DIGEST = "config_sha256"
SEAL = "file_sha256"
RECORD = "point_peft"
LEFTOVER = re.compile(r"\.(adapter_config\.json|adapter_model\.safetensors|README\.md)\.[0-9a-f]{12}\.tmp")
Stamps = tuple[tuple[int, int] | None, ...]
Reading = tuple[bytes, int] | None
"""The bytes that were read from the beginning of a file, and its size; None where there is none."""
Card = Callable[[str | None, int], str]
"""The text of the card, from that of the present one, if there is one, and the bytes of the tensors' file."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as read from a folder: the JSON object of its configuration, and its tensors without `KEY_PREFIX`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any] | None
    """In PEFT's format: what our own would say in its configuration; None in our own, and where PEFT wrote the file."""
    edited: bool
    """True if the configuration is another than the one that the tensors were saved with."""

    @property
    def foreign(self) -> bool:
        """True if PEFT wrote the files."""
        return self.config["peft_type"] != PEFT_TYPE and self.record is None

    @property
    def about(self) -> dict[str, Any]:
        """The adapter's configuration: of PEFT's format our record, unless the configuration was edited since."""
        return self.config if self.record is None or self.edited else self.record


def methods_of_peft() -> dict[str, type[TunerConfig]]:
    """The methods that can be written in PEFT's format, by its names for them."""
    return {kind.peft_type: kind for kind in METHODS.values() if kind.peft_type is not None}


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


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
    text, data, header = read_pair(folder)
    where = f"'{folder / TENSOR_FILE}'"
    try:
        tensors = dict(sorted(safetensors.torch.load(data).items()))
    except KeyError as error:
        raise AdapterFileError(f"{where} has a tensor of an unknown type: {quoted(error.args[0])}") from error
    except (SafetensorError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"{where} is not a safetensors file: {quoted(str(error), 200)[1:-1]}") from error
    metadata = metadata_of(header)
    values = memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    if SEAL in metadata and metadata[SEAL] != seal_of(header, values):
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
    """The configuration in a folder, the tensors' file and what its header says, as they belong together.

    A configuration that does not fit the tensors has been edited by hand, and counts; what does not fit shows later.
    """
    text, data, _, header, _ = _read_together(folder, _read)
    return text, data, header


@dataclass(frozen=True)
class Headers:
    """An adapter in a folder as far as the headers of its files tell; no tensor was read."""

    text: bytes
    """The configuration, as `parse_config` takes it."""
    header: Any
    """The header of the tensors' file, of which is only known that it is JSON."""
    length: int
    """The bytes of that file before its values."""
    size: int
    """The bytes of that file."""
    stamps: Stamps
    """Marks by which one sees that the files were replaced since."""


def read_headers(folder: Path) -> Headers:
    """Read what describes an adapter; whatever is wrong with the files as far as that goes is `AdapterFileError`."""
    text, head, size, header, seen = _read_together(folder, _read_head)
    return Headers(text, header, 8 + int.from_bytes(head[:8], "little"), size, seen)


def _read_together(folder: Path, read: Callable[[Path, int], Reading]) -> tuple[bytes, bytes, int, Any, Stamps]:
    """The configuration, what `read` gives of the tensors' file, the header of that, and the marks of the files."""
    try:
        if not folder.is_dir():
            raise AdapterFileError(f"there is no folder '{folder}'")
        path = folder / TENSOR_FILE
        for _ in range(_ROUNDS):
            before = stamps(folder)
            got = read(path, MAX_TENSOR_BYTES)
            if got is None:
                raise AdapterFileError(f"there is no file '{path}'")
            data, size = got
            header = parse_header(data, path)
            digest = metadata_of(header).get(DIGEST)
            text, fits = _config_text(folder, digest)
            # What does not fit while nothing was replaced has been edited by hand.
            if fits or digest is None or stamps(folder) == before:
                return text, data, size, header, before
    except OSError as error:
        raise AdapterFileError(f"cannot read '{folder}': {error.strerror or error}") from error
    raise AdapterFileError(f"cannot read '{folder}': it is being written to all the time")


def stamps(folder: Path) -> Stamps:
    """Marks by which one sees that a file of a folder is replaced: a save gives each a new inode."""
    marks: list[tuple[int, int] | None] = []
    for name in (CONFIG_FILE, PENDING_CONFIG_FILE, TENSOR_FILE):
        try:
            stat = os.stat(os.path.join(folder, name))
            marks.append((stat.st_ino, stat.st_mtime_ns))
        except FileNotFoundError:
            marks.append(None)
    return tuple(marks)


def _config_text(folder: Path, digest: str | None) -> tuple[bytes, bool]:
    """The configuration that goes with the tensors of a folder, the file's or after an interrupted save the pending.

    And whether it is the one that the tensors were saved with.
    """
    path = folder / CONFIG_FILE
    got = _read(path, MAX_CONFIG_BYTES)
    if digest is not None and (got is None or sha256(got[0]) != digest):
        pending = _read(folder / PENDING_CONFIG_FILE, MAX_CONFIG_BYTES)
        if pending is not None and sha256(pending[0]) == digest:
            return pending[0], True
    if got is None:
        raise AdapterFileError(f"there is no file '{path}'")
    return got[0], digest == sha256(got[0])


def _read(path: Path, limit: int, *, head: bool = False) -> Reading:
    """A file of at most so many bytes, or of one of tensors the head."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise AdapterFileError(f"'{path}' has {size} bytes, more than the {limit} that are read")
            if not head:
                return file.read(), size
            start = file.read(8)
            return start + file.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES)), size
    except FileNotFoundError:  # a save has just moved it
        return None


def _read_head(path: Path, limit: int) -> Reading:
    return _read(path, limit, head=True)


def parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object of a configuration, of a format that this version reads."""
    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        if b"\\u" in text:
            json.dumps(config, ensure_ascii=False).encode()  # an escape may stand for half a character
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"'{path}' must hold a JSON object, not a {type(config).__name__}")
    if text.count(b"{") + text.count(b"[") > MAX_NESTING and not _shallow(config, MAX_NESTING):
        raise AdapterFileError(f"'{path}' is nested deeper than the {MAX_NESTING} levels that are read")
    peft_type, known = config.get("peft_type"), [PEFT_TYPE, *methods_of_peft()]
    if peft_type not in known:
        readable = " and ".join(f"'{name}'" for name in known)
        raise AdapterFileError(f"'{path}': peft_type is {quoted(peft_type)}; this version reads {readable}")
    if peft_type != PEFT_TYPE:
        return config
    version = config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        newer = ": a newer point_peft is needed" if type(version) is int and version > FORMAT_VERSION else ""
        raise AdapterFileError(
            f"'{path}' has format version {quoted(version)}; point_peft {__version__} reads version {FORMAT_VERSION}"
            + newer
        )
    return config


def _shallow(value: Any, levels: int) -> bool:
    """True if objects and lists lie in each other no deeper than so many levels."""
    layer = [value]
    for _ in range(levels + 1):
        held = [entry for entry in layer if isinstance(entry, (dict, list))]
        layer = [inner for entry in held for inner in (entry.values() if isinstance(entry, dict) else entry)]
        if not layer:
            return True
    return False


def parse_header(data: bytes, path: Path) -> Any:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise AdapterFileError(f"'{path}' is not a safetensors file, or it is cut off")
    if length > MAX_HEADER_BYTES:
        raise AdapterFileError(f"'{path}': a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        return json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not a safetensors file: its header is not JSON") from error


def metadata_of(header: Any) -> dict[str, str]:
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise json.JSONDecodeError("a key stands twice in an object", "", 0)
    return values


def _no_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is not a value of JSON", "", 0)


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, card: Card, record: Mapping[str, Any] | None = None
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
    try:
        got = _read_head(path, MAX_TENSOR_BYTES)
        return None if got is None else metadata_of(parse_header(got[0], path)).get(DIGEST)
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
