"""An adapter as files: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

Reading is strict both ways and checks everything before a model is touched. Writing is atomic: the tensors and their
configuration are one adapter, so the tensors' file carries the digest of its configuration, and a new configuration
lies beside the old one until the tensors have been replaced. Whenever the process dies, a reader finds a complete
adapter, the old one or the new. The tensors' file carries its own digest too, because a changed value would go unseen.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from point_peft.errors import AdapterFileError, quoted
from point_peft.matching import nearest_names
from point_peft.version import __version__

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows, where saves of several processes into one folder are not kept apart
    fcntl = None

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PENDING_CONFIG_FILE = ".adapter_config.json.pending"

FORMAT_VERSION = 1
PEFT_TYPE = "POINT_PEFT"
LORA_TYPE = "LORA"
"""The `peft_type` of an adapter in PEFT's own format."""
KEY_PREFIX = "base_model.model."

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSOR_BYTES = 4 << 30
MAX_HEADER_BYTES = 8 << 20
MAX_NESTING = 64
"""No object or list of a configuration lies deeper: what goes through it must not run out of stack."""
_DIGEST = "config_sha256"
_SEAL = "file_sha256"
_RECORD = "point_peft"
_LEFTOVER = re.compile(r"\.(adapter_config\.json|adapter_model\.safetensors|README\.md)\.[0-9a-f]{12}\.tmp")
_ROUNDS = 10

Card = Callable[[str | None, int], str]
"""What the card is to say, from what the present one says, if there is one, and the bytes of the tensors' file."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as read from a folder: the JSON object of its configuration, and its tensors without `KEY_PREFIX`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any] | None
    """In PEFT's format: what our own would say in its configuration; None in our own, and where PEFT wrote the file."""
    edited: bool
    """Whether the configuration is another than the one that the tensors were saved with."""

    @property
    def foreign(self) -> bool:
        """Whether PEFT wrote the files."""
        return self.config["peft_type"] == LORA_TYPE and self.record is None


# ---- the base's fingerprint ------------------------------------------------------------------------------------------


# Eight-byte words that are added up before they are digested: that is ten times as fast, and done at every load.
BLOCK = 128
# Tensors of fewer words are taken as one, because a call for each of them would take longer than its sums.
SMALL = 64 * BLOCK


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fingerprint of these tensors of a backbone: its names and shapes, its types, its values."""
    ordered = sorted(tensors.items())
    structure = [f"{name} {list(tensor.shape)}" for name, tensor in ordered]
    words = [_words(tensor) for _, tensor in ordered] or [torch.empty(0, dtype=torch.int64)]
    devices = {some.device for some in words}
    # Of a model on several devices, what is small and what is summed meet on the CPU; the rest stays where it is.
    meeting = devices.pop() if len(devices) == 1 else torch.device("cpu")
    small = [some.to(meeting) for some in words if len(some) < SMALL]
    large = [some for some in words if len(some) >= SMALL]
    sums = [part.to(meeting) for some in (*([torch.cat(small)] if small else []), *large) for part in _sums(some)]
    return {
        "tensors": len(tensors),
        "values": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({_dtype(tensor) for tensor in tensors.values()}),
        "structure_sha256": _sha256("\n".join(structure).encode()),
        "sums_sha256": hashlib.sha256(torch.cat(sums).cpu().numpy().data).hexdigest(),
    }


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as words of eight bytes, of one where that does not come out even."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.dtype is torch.float32 and flat.numel() % 2 == 0 and flat.storage_offset() % 2 == 0:
        return flat.view(torch.int64)  # what follows, in fewer steps
    raw = flat.view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    return raw.view(torch.int64) if raw.numel() % 8 == 0 else raw.to(torch.int64)


def _sums(words: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of words, block by block, and what is left of them."""
    whole = len(words) // BLOCK * BLOCK
    return words[:whole].view(-1, BLOCK).sum(dim=1), words[whole:]


def check_fingerprint(stated: Any, actual: Mapping[str, Any], model: str) -> str | None:
    """Refuse a backbone that an adapter was not made for; a returned sentence is for a warning."""
    if (
        not isinstance(stated, Mapping)
        or {key: type(value) for key, value in stated.items()} != {key: type(value) for key, value in actual.items()}
        or not all(isinstance(name, str) for name in stated["dtypes"])
    ):
        raise AdapterFileError(f"{CONFIG_FILE}: base_fingerprint is not one that this version of point_peft writes")
    if stated["structure_sha256"] != actual["structure_sha256"]:
        raise AdapterFileError(
            f"this adapter belongs to another backbone: its base has {stated['tensors']} frozen tensors with "
            f"{stated['values']} values, this {model} has {actual['tensors']} with {actual['values']}, or of other "
            "names or shapes"
        )
    if stated["dtypes"] != actual["dtypes"]:
        return (
            f"the adapter was trained on a base in {quoted(', '.join(stated['dtypes']))[1:-1]}, this one is in "
            f"{', '.join(actual['dtypes'])}: whether it is the same base cannot be told"
        )
    if stated["sums_sha256"] != actual["sums_sha256"]:
        raise AdapterFileError(
            f"this adapter belongs to other weights of the backbone: this {model} has the right tensors with other "
            "values; load the checkpoint that the adapter was trained on"
        )
    return None


# ---- tensors ---------------------------------------------------------------------------------------------------------


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], free_rows: frozenset[str], where: str
) -> None:
    """Every name, shape, type and value must fit; the first that does not is named."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AdapterFileError(f"{where} lacks the tensor {quoted(missing[0])}{more}")
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        near = nearest_names(unexpected[0], list(expected), what="tensor")
        raise AdapterFileError(
            f"{where} has a tensor {quoted(unexpected[0])}{more} that the adapter has not; nearest: {near}"
        )
    for name, tensor in tensors.items():
        wanted = expected[name]
        shape, wanted_shape = tuple(tensor.shape), tuple(wanted.shape)
        free = name in free_rows and tensor.ndim == wanted.ndim > 0
        if shape[free:] != wanted_shape[free:]:
            shown = ("any", *wanted_shape[1:]) if name in free_rows else wanted_shape
            raise AdapterFileError(f"{where}: '{name}' is {_shape(shape)}, this model needs {_shape(shown)}")
        if tensor.dtype != wanted.dtype and not (tensor.dtype in _FLOATS and wanted.dtype in _FLOATS):
            raise AdapterFileError(f"{where}: '{name}' is {_dtype(tensor)}, this model needs {_dtype(wanted)}")
    check_finite(tensors, where)


def _shape(shape: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity."""
    for name, tensor in tensors.items():
        # The largest is not finite if any is not, and found in fewer steps.
        if tensor.is_floating_point() and tensor.numel() and not math.isfinite(tensor.detach().abs().amax()):
            raise AdapterFileError(f"{where}: '{name}' holds values that are not finite")


def copy_tensors(
    source: Mapping[str, Tensor],
    target: nn.Module,
    names: Mapping[str, Tensor],
    device: torch.device,
    *,
    keep_types: bool = True,
) -> None:
    """Put checked tensors in the place of the tensors `names` of a module that is not attached yet, on a device.

    They keep the types that they have in the file, or take those of the tensors that they replace, which may be without
    memory.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in target.modules():
        for key, tensor in _own_tensors(module):
            owners.setdefault(id(tensor), []).append((module, key))
    for name, tensor in source.items():
        wanted = names[name]
        placed = tensor.to(device, tensor.dtype if keep_types else wanted.dtype)
        parameter = nn.Parameter(placed, wanted.requires_grad) if isinstance(wanted, nn.Parameter) else None
        for module, key in owners[id(wanted)]:
            if parameter is not None:
                module._parameters[key] = parameter
            else:
                module._buffers[key] = placed


def why_not_in_place(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], *, keep_types: bool = True
) -> str | None:
    """Why checked tensors cannot be put into the memory of others of their names; None if they can.

    As `copy_tensors` says, they may have to keep their types.
    """
    for name, tensor in source.items():
        there = target[name]
        if tensor.shape != there.shape:
            return f"its '{name}' has {len(tensor)} rows, and the memory that is there is for {len(there)}"
        if keep_types and tensor.dtype != there.dtype:
            return f"its '{name}' is {_dtype(tensor)}, what is there {_dtype(there)}"
    return None


def overwrite_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Put values into tensors of the same names and shapes, which stay where they are. All or none."""
    # What can fail or be interrupted comes first: the copies are one call, in which Ctrl-C is not heard.
    placed = [tensor.to(target[name].device, target[name].dtype) for name, tensor in source.items()]
    with torch.inference_mode():  # which may also write to tensors that were made in it, and counts as a change too
        torch._foreach_copy_([target[name] for name in source], placed)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(key, tensor) for key, tensor in own if tensor is not None]


# ---- writing ---------------------------------------------------------------------------------------------------------


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
    # Clones, because tensors that share memory are not written.
    plain = {
        KEY_PREFIX + name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }
    check_finite(plain, "the adapter")
    metadata = {"format": "pt", _DIGEST: _sha256(text)}
    if record is not None:
        metadata[_RECORD] = json.dumps(record, sort_keys=True, ensure_ascii=False)
    data = _sealed(safetensors.torch.save(plain, metadata=metadata))
    _replace_adapter(folder, text, data, card)


def copy_folder(source: Path, folder: Path) -> None:
    """Copy an adapter's configuration and tensors, byte for byte, into a folder. Complete or not at all."""
    read_folder(source)
    try:
        text, data, _ = _read_pair(source)
    except OSError as error:
        raise AdapterFileError(f"cannot read '{source}': {error.strerror or error}") from error
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
    parsed["__metadata__"][_SEAL] = _seal(parsed, memoryview(data)[start:])
    header = json.dumps(parsed, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


def _seal(header: Mapping[str, Any], values: memoryview) -> str:
    """The digest of a safetensors file: of what its header says, but for the digest itself, and of its values."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != _SEAL}
    digest = hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    digest.update(values)
    return digest.hexdigest()


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
        current = _sha256(config.read_bytes()) if config.is_file() else None
        if stated is not None and current != stated == _sha256(pending.read_bytes()):
            os.replace(pending, config)
        else:
            pending.unlink()
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()


def _stated_digest(path: Path) -> str | None:
    """The digest of its configuration that a file of tensors states; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES))
    try:
        return _metadata(_header(start, path)).get(_DIGEST)
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
    """What to write as the card; None: what is there stays, as a link does, whatever it leads to."""
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


# ---- reading ---------------------------------------------------------------------------------------------------------


def leftovers(folder: Path) -> list[str]:
    """The files that an interrupted save has left in a folder; the next save removes them."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name == PENDING_CONFIG_FILE or _LEFTOVER.fullmatch(name))


def read_folder(folder: Path) -> AdapterFiles:
    """Read an adapter's files; whatever is wrong with them raises `AdapterFileError`."""
    try:
        if not folder.is_dir():
            raise AdapterFileError(f"there is no folder '{folder}'")
        text, data, header = _read_pair(folder)
    except OSError as error:
        raise AdapterFileError(f"cannot read '{folder}': {error.strerror or error}") from error
    where = f"'{folder / TENSOR_FILE}'"
    try:
        tensors = dict(sorted(safetensors.torch.load(data).items()))
    except KeyError as error:
        raise AdapterFileError(f"{where} has a tensor of an unknown type: {quoted(error.args[0])}") from error
    except (SafetensorError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"{where} is not a safetensors file: {quoted(str(error), 200)[1:-1]}") from error
    metadata = _metadata(header)
    if _SEAL in metadata and metadata[_SEAL] != _seal(
        header, memoryview(data)[8 + int.from_bytes(data[:8], "little") :]
    ):
        raise AdapterFileError(
            f"{where} is damaged, or another program has changed it: its digest is not the {_SEAL} that its metadata "
            "states; get it again from where it came"
        )
    wrong = [name for name in tensors if not name.startswith(KEY_PREFIX)]
    if wrong:
        raise AdapterFileError(f"{where}: the tensor name {quoted(wrong[0])} does not begin with '{KEY_PREFIX}'")
    config, record = parse_config(text, folder / CONFIG_FILE), None
    if config["peft_type"] == LORA_TYPE and _RECORD in metadata:
        record = parse_config(metadata[_RECORD].encode(), folder / TENSOR_FILE)
    return AdapterFiles(
        config=config,
        tensors={name.removeprefix(KEY_PREFIX): tensor for name, tensor in tensors.items()},
        record=record,
        edited=metadata.get(_DIGEST) != _sha256(text),
    )


def _read_pair(folder: Path) -> tuple[bytes, bytes, Any]:
    """The configuration in a folder, the tensors' file and what its header says.

    They are those that belong together, whatever a save does meanwhile.

    A configuration that does not fit the tensors has been edited by hand, and counts; what does not fit shows later.
    """
    for _ in range(_ROUNDS):
        before = _stamps(folder)
        data = _read(folder / TENSOR_FILE, MAX_TENSOR_BYTES)
        header = _header(data, folder / TENSOR_FILE)
        digest = _metadata(header).get(_DIGEST)
        text, fits = _config_text(folder, digest)
        # What does not fit while nothing was replaced has been edited by hand.
        if fits or digest is None or _stamps(folder) == before:
            return text, data, header
    raise AdapterFileError(f"cannot read '{folder}': it is being written to all the time")


def parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object of a configuration, of a format that this version reads."""
    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(config, ensure_ascii=False).encode()  # an escape may stand for half a character
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"'{path}' must hold a JSON object, not a {type(config).__name__}")
    if not _shallow(config, MAX_NESTING):
        raise AdapterFileError(f"'{path}' is nested deeper than the {MAX_NESTING} levels that are read")
    if config.get("peft_type") not in (PEFT_TYPE, LORA_TYPE):
        found = quoted(config.get("peft_type"))
        raise AdapterFileError(f"'{path}': peft_type is {found}; this version reads '{PEFT_TYPE}' and '{LORA_TYPE}'")
    if config["peft_type"] == LORA_TYPE:
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
    """Whether objects and lists lie in each other no deeper than so many levels."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_shallow(entry, levels - 1) for entry in inside)


def _stamps(folder: Path) -> list[tuple[int, int] | None]:
    """What tells whether one of the files of a folder is replaced: a save gives each a new inode."""
    stamps: list[tuple[int, int] | None] = []
    for name in (CONFIG_FILE, PENDING_CONFIG_FILE, TENSOR_FILE):
        try:
            found = (folder / name).stat()
        except FileNotFoundError:
            stamps.append(None)
        else:
            stamps.append((found.st_ino, found.st_mtime_ns))
    return stamps


def _config_text(folder: Path, digest: str | None) -> tuple[bytes, bool]:
    """The configuration that goes with the tensors of a folder, the file's or after an interrupted save the pending.

    And whether it is the one that the tensors were saved with.
    """
    text = _read_if_there(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    if digest is not None and (text is None or _sha256(text) != digest):
        pending = _read_if_there(folder / PENDING_CONFIG_FILE, MAX_CONFIG_BYTES)
        if pending is not None and _sha256(pending) == digest:
            return pending, True
    if text is None:
        raise AdapterFileError(f"there is no file '{folder / CONFIG_FILE}'")
    return text, digest == _sha256(text)


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


def _header(data: bytes, path: Path) -> Any:
    """What the header of a safetensors file says."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise AdapterFileError(f"'{path}' is not a safetensors file, or it is cut off")
    if length > MAX_HEADER_BYTES:
        raise AdapterFileError(f"'{path}': a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        return json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not a safetensors file: its header is not JSON") from error


def _metadata(header: Any) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise json.JSONDecodeError("a key stands twice in an object", "", 0)
    return found


def _no_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is not a value of JSON", "", 0)


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
