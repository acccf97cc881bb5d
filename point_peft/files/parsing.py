"""Untrusted bytes parsed: the JSON of a configuration, the header of a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from point_peft.errors import AdapterFileError, quoted
from point_peft.files.format import FORMAT_VERSION, MAX_HEADER_BYTES, MAX_NESTING, PEFT_TYPE, methods_of_peft
from point_peft.version import __version__


def parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object of a configuration, of a format that this version reads."""
    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
        json.dumps(config, ensure_ascii=False).encode()  # an escape may stand for half a character
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"'{path}' must hold a JSON object, not a {type(config).__name__}")
    if not _shallow(config, MAX_NESTING):
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
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_shallow(entry, levels - 1) for entry in inside)


def parse_header(data: bytes, path: Path) -> Any:
    """The header of a safetensors file, as JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise AdapterFileError(f"'{path}' is not a safetensors file, or it is cut off")
    if length > MAX_HEADER_BYTES:
        raise AdapterFileError(f"'{path}': a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        return json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"'{path}' is not a safetensors file: its header is not JSON") from error


def metadata_of(header: Any) -> dict[str, str]:
    """The metadata in the header of a safetensors file."""
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise json.JSONDecodeError("a key stands twice in an object", "", 0)
    return values


def _no_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is not a value of JSON", "", 0)
