"""Tensors of a file checked against those of an adapter, and put in their place."""

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.adapting.border import TRAINED
from point_peft.errors import AdapterFileError, nearest_names, quoted
from point_peft.torch_private import overwrite

Tensors = Mapping[str, Tensor]
SHARDED = "torch.distributed.tensor"
"""The module of torch whose tensors are spread over processes."""


def check_tensors(tensors: Tensors, expected: Tensors, free_rows: frozenset[str], where: str) -> None:
    """Every name, shape, type and value must fit; the first that does not is named.

    A scalar fits where one value (1,) is asked for: gates are scalars in files of version 0.1.0.
    """
    if missing := [name for name in expected if name not in tensors]:
        raise AdapterFileError(f"{where} lacks the tensor {_first(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        near = nearest_names(unexpected[0], list(expected), what="tensor")
        raise AdapterFileError(f"{where} has a tensor {_first(unexpected)} that the adapter has not; nearest: {near}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        shape, wanted_shape = tuple(tensor.shape), tuple(wanted.shape)
        free = name in free_rows and tensor.ndim == wanted.ndim > 0
        if shape[free:] != wanted_shape[free:] and (shape, wanted_shape) != ((), (1,)):
            shown = ("any", *wanted_shape[1:]) if name in free_rows else wanted_shape
            raise AdapterFileError(f"{where}: '{name}' is {_shape(shape)}, this model needs {_shape(shown)}")
        if tensor.dtype != wanted.dtype and not (tensor.dtype in TRAINED and wanted.dtype in TRAINED):
            raise AdapterFileError(f"{where}: '{name}' is {dtype_name(tensor)}, this model needs {dtype_name(wanted)}")
    check_finite(tensors, where)


def _first(names: list[str]) -> str:
    return quoted(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _shape(shape: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over processes (a DTensor)."""
    # Its module takes seconds to import; where it is not, nothing is sharded.
    module = sys.modules.get(SHARDED)
    return module is not None and isinstance(tensor, module.DTensor)


def check_finite(tensors: Tensors, where: str) -> None:
    """Refuse NaN and infinity."""
    for name, tensor in tensors.items():
        # The largest is not finite if any is not, and found in fewer steps.
        if tensor.is_floating_point() and tensor.numel() and not math.isfinite(tensor.detach().abs().amax()):
            raise AdapterFileError(f"{where}: '{name}' holds values that are not finite")


def unshared(tensors: Tensors) -> dict[str, Tensor]:
    """Clones on the CPU: safetensors writes no tensors that share memory."""
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def copy_tensors(
    source: Tensors, target: nn.Module, names: Tensors, device: torch.device, types: Mapping[str, torch.dtype]
) -> None:
    """Put checked tensors in the place of the tensors `names` of a module that is not attached yet, on a device.

    Those that they replace may be without memory.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in target.modules():
        for key, held in (*module._parameters.items(), *module._buffers.items()):
            owners.setdefault(id(held), []).append((module, key))
    for name, tensor in source.items():
        wanted = names[name]
        placed = tensor.to(device, types[name])
        if tensor.ndim == 0:
            placed = placed.reshape(wanted.shape)  # a scalar may fill a place of one value (1,)
        if isinstance(wanted, nn.Parameter):
            placed = nn.Parameter(placed, wanted.requires_grad)
        for module, key in owners[id(wanted)]:
            setattr(module, key, placed)


def why_not_in_place(source: Tensors, target: Tensors, *, keep_types: bool) -> str | None:
    """Why checked tensors, in their types or others, cannot be put into the memory of others; None if they can."""
    for name, tensor in source.items():
        there = target[name]
        if tensor.ndim and tensor.shape != there.shape:
            return f"its '{name}' has {len(tensor)} rows, and the memory that is there is for {len(there)}"
        if keep_types and tensor.dtype != there.dtype:
            return f"its '{name}' is {dtype_name(tensor)}, what is there {dtype_name(there)}"
    return None


def overwrite_tensors(source: Tensors, target: Tensors) -> None:
    """Put values into tensors of the same names and shapes, which stay where they are. All or none."""
    # What can fail or be interrupted comes first.
    placed = [tensor.to(target[name].device, target[name].dtype) for name, tensor in source.items()]
    with torch.inference_mode():  # which may also write to tensors that were made in it, and counts as a change too
        overwrite([target[name] for name in source], placed)
