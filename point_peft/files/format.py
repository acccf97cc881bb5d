"""Names, limits and versions of an adapter's files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from point_peft.config import METHODS, TunerConfig

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
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
DIGEST = "config_sha256"
SEAL = "file_sha256"
RECORD = "point_peft"
LEFTOVER = re.compile(r"\.(adapter_config\.json|adapter_model\.safetensors|README\.md)\.[0-9a-f]{12}\.tmp")
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


def methods_of_peft() -> dict[str, type[TunerConfig]]:
    """The methods that can be written in PEFT's format, by its names for them."""
    return {kind.peft_type: kind for kind in METHODS.values() if kind.peft_type is not None}


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
