"""The fingerprint of a backbone."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from point_peft.errors import AdapterFileError, quoted
from point_peft.files.format import CONFIG_FILE, sha256
from point_peft.files.tensors import dtype_name

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
        "dtypes": sorted({dtype_name(tensor) for tensor in tensors.values()}),
        "structure_sha256": sha256("\n".join(structure).encode()),
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
