"""An adapter as files: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

Reading is strict both ways and checks everything before a model is touched. Writing is atomic: the tensors and their
configuration are one adapter, so the tensors' file carries the digest of its configuration, and a new configuration
lies beside the old one until the tensors have been replaced. Whenever the process dies, a reader finds a complete
adapter, the old one or the new.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from point_peft.errors import AdapterFileError
from point_peft.matching import nearest_names
from point_peft.version import __version__

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PENDING_CONFIG_FILE = ".adapter_config.json.pending"

FORMAT_VERSION = 1
PEFT_TYPE = "POINT_PEFT"
KEY_PREFIX = "base_model.model."

MAX_CONFIG_BYTES = 1 << 20
MAX_TENSOR_BYTES = 4 << 30
_DIGEST = "config_sha256"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as read from a folder: the JSON object of its configuration, and its tensors without `KEY_PREFIX`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


# ---- the base's fingerprint ------------------------------------------------------------------------------------------


class Fingerprints:
    """Digests of a backbone's tensors, taken when first needed and again only for tensors that have changed."""

    def __init__(self) -> None:
        self._digests: dict[str, tuple[tuple[int, int], str]] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The fingerprint of these tensors of a backbone: its names and shapes, its types, its values."""
        structure = [f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())]
        values = [f"{name} {self._digest(name, tensor)}" for name, tensor in sorted(tensors.items())]
        return {
            "tensors": len(tensors),
            "values": sum(tensor.numel() for tensor in tensors.values()),
            "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
            "structure_sha256": _sha256("\n".join(structure).encode()),
            "values_sha256": _sha256("\n".join(values).encode()),
        }

    def _digest(self, name: str, tensor: Tensor) -> str:
        state = (tensor.data_ptr(), tensor._version)
        known = self._digests.get(name)
        if known is None or known[0] != state:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            known = (state, hashlib.sha256(memoryview(raw.numpy())).hexdigest())
            self._digests[name] = known
        return known[1]


def check_fingerprint(stated: Any, actual: Mapping[str, Any], model: str) -> str | None:
    """Refuse a backbone that an adapter was not made for; a returned sentence is for a warning."""
    if not isinstance(stated, Mapping) or set(stated) != set(actual):
        raise AdapterFileError(f"{CONFIG_FILE}: base_fingerprint is not one that this version of point_peft writes")
    if stated["structure_sha256"] != actual["structure_sha256"]:
        raise AdapterFileError(
            f"this adapter belongs to another backbone: its base has {stated['tensors']} frozen tensors with "
            f"{stated['values']} values, this {model} has {actual['tensors']} with {actual['values']}, or of other shapes"
        )
    if stated["dtypes"] != actual["dtypes"]:
        return (
            f"the adapter was trained on a base in {', '.join(stated['dtypes'])}, this one is in "
            f"{', '.join(actual['dtypes'])}: whether it is the same base cannot be told"
        )
    if stated["values_sha256"] != actual["values_sha256"]:
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
        raise AdapterFileError(f"{where} lacks the tensor '{missing[0]}'{more}")
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        near = nearest_names(unexpected[0], list(expected), what="tensor")
        raise AdapterFileError(f"{where} has a tensor '{unexpected[0]}'{more} that the adapter has not; nearest: {near}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        shape, wanted_shape = tuple(tensor.shape), tuple(wanted.shape)
        fits = shape[1:] == wanted_shape[1:] and tensor.ndim == wanted.ndim if name in free_rows else shape == wanted_shape
        if not fits:
            shown = ("any", *wanted_shape[1:]) if name in free_rows else wanted_shape
            raise AdapterFileError(f"{where}: '{name}' is {shape}, this model needs {shown}")
        if tensor.dtype != wanted.dtype and not (tensor.dtype in _FLOATS and wanted.dtype in _FLOATS):
            raise AdapterFileError(f"{where}: '{name}' is {tensor.dtype}, this model needs {wanted.dtype}")
    check_finite(tensors, where)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{where}: '{name}' holds values that are not finite")


def copy_tensors(source: Mapping[str, Tensor], target: nn.Module, names: Mapping[str, Tensor]) -> None:
    """Put checked tensors into the tensors `names` of a module that is not attached yet, with the file's types."""
    owners = {id(tensor): (module, key) for module in target.modules() for key, tensor in _own_tensors(module)}
    with torch.no_grad():
        for name, tensor in source.items():
            module, key = owners[id(names[name])]
            placed = tensor.to(names[name].device)
            if isinstance(names[name], nn.Parameter):
                names[name].data = placed
            else:
                module._buffers[key] = placed


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(key, tensor) for key, tensor in own if tensor is not None]


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Write an adapter into a folder, which is made if need be; other files in it stay. Complete or not at all."""
    text = (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    plain = {KEY_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    check_finite(plain, "the adapter")
    data = safetensors.torch.save(plain, metadata={"format": "pt", _DIGEST: _sha256(text)})
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"cannot save to '{folder}': it is not a folder")
    try:
        if folder.is_dir():
            _replace_files(folder, text, data, card)
        else:
            _write_new(folder, text, data, card)
    except OSError as error:
        raise AdapterFileError(f"cannot save to '{folder}': {error.strerror or error}") from error


def _write_new(folder: Path, text: bytes, data: bytes, card: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.tmp"
    temporary.mkdir()
    try:
        _write(temporary / CONFIG_FILE, text)
        _write(temporary / TENSOR_FILE, data)
        _write(temporary / CARD_FILE, card.encode())
        os.rename(temporary, folder)
    except BaseException:
        for path in temporary.iterdir():
            path.unlink()
        temporary.rmdir()
        raise
    _sync_folder(folder.parent)


def _replace_files(folder: Path, text: bytes, data: bytes, card: str) -> None:
    suffix = f".{secrets.token_hex(6)}.tmp"
    temporary = {name: folder / f".{name}{suffix}" for name in (CONFIG_FILE, TENSOR_FILE, CARD_FILE)}
    try:
        _write(temporary[CONFIG_FILE], text)
        _write(temporary[TENSOR_FILE], data)
        if not (folder / CARD_FILE).exists():
            _write(temporary[CARD_FILE], card.encode())
        # The moment that counts is the replacement of the tensors: before it the old configuration fits, after it the
        # pending one does, and the tensors' header says which.
        os.replace(temporary[CONFIG_FILE], folder / PENDING_CONFIG_FILE)
        os.replace(temporary[TENSOR_FILE], folder / TENSOR_FILE)
        os.replace(folder / PENDING_CONFIG_FILE, folder / CONFIG_FILE)
        if temporary[CARD_FILE].exists():
            os.replace(temporary[CARD_FILE], folder / CARD_FILE)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    _sync_folder(folder)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> AdapterFiles:
    """Read an adapter's files; whatever is wrong with them raises `AdapterFileError`."""
    if not folder.is_dir():
        raise AdapterFileError(f"there is no folder '{folder}'")
    data = _read(folder / TENSOR_FILE, MAX_TENSOR_BYTES)
    metadata = _metadata(data, folder / TENSOR_FILE)
    text = _config_text(folder, metadata.get(_DIGEST))
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"'{folder / TENSOR_FILE}' is not a safetensors file: {error}") from error
    wrong = [name for name in tensors if not name.startswith(KEY_PREFIX)]
    if wrong:
        raise AdapterFileError(f"'{folder / TENSOR_FILE}': the tensor name '{wrong[0]}' does not begin with '{KEY_PREFIX}'")
    return AdapterFiles(
        parse_config(text, folder / CONFIG_FILE), {name.removeprefix(KEY_PREFIX): t for name, t in tensors.items()}
    )


def parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object of a configuration, of a format that this version reads."""
    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"'{path}' must hold a JSON object, not a {type(config).__name__}")
    if config.get("peft_type") != PEFT_TYPE:
        raise AdapterFileError(f"'{path}': peft_type is {config.get('peft_type')!r}; this version reads {PEFT_TYPE!r}")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"'{path}' has format version {version!r}; point_peft {__version__} reads version {FORMAT_VERSION}: a newer "
            "point_peft is needed"
        )
    return config


def _config_text(folder: Path, digest: str | None) -> bytes:
    """The configuration that goes with the tensors of a folder: the file's, or after an interrupted save the pending.

    A file that fits neither has been edited by hand, and counts; what does not fit the tensors shows later.
    """
    pending = folder / PENDING_CONFIG_FILE
    text = _read(folder / CONFIG_FILE, MAX_CONFIG_BYTES) if (folder / CONFIG_FILE).exists() else None
    if digest is not None and (text is None or _sha256(text) != digest) and pending.exists():
        waiting = _read(pending, MAX_CONFIG_BYTES)
        if _sha256(waiting) == digest:
            return waiting
    if text is None:
        raise AdapterFileError(f"there is no file '{folder / CONFIG_FILE}'")
    return text


def _read(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():
            raise AdapterFileError(f"there is no file '{path}'")
        size = path.stat().st_size
        if size > limit:
            raise AdapterFileError(f"'{path}' has {size} bytes, more than the {limit} that are read")
        return path.read_bytes()
    except OSError as error:
        raise AdapterFileError(f"cannot read '{path}': {error.strerror or error}") from error


def _metadata(data: bytes, path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, 100_000_000):
        raise AdapterFileError(f"'{path}' is not a safetensors file: it is cut off")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not a safetensors file: its header is not JSON") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise json.JSONDecodeError("a key stands twice in an object", "", 0)
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
