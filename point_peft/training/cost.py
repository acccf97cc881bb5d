"""The cost of a training, told before its first step from one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from point_peft.files.tensors import is_sharded
from point_peft.training.state import trained


@dataclass(frozen=True)
class Cost:
    """The outcome of a trial."""

    trainable: int
    parameters: int
    peak_bytes: int
    """Of one process: values, gradients, AdamW's moments, and what the forward keeps for the backward pass."""
    unused: bool
    """True if some trained parameter got no gradient."""

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.parameters, 1)
        return (
            f"trains {self.trainable:,} of {self.parameters:,} parameters ({share:.2f} %); "
            f"about {self.peak_bytes / 2**20:,.0f} MiB at the peak for each process"
        )


def try_once(model: nn.Module, backward: Callable[[], None]) -> Cost:
    """Run `backward`, which goes forward and backward once on one process's part of a batch, and leave no trace of it.

    The values of buffers (running statistics) are put back, gradients are dropped.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            kept[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, _same):
        backward()
    parameters = {id(p): p for p in model.parameters()}
    own = trained(model)
    unused = any(p.grad is None for p in own.values())
    for p in own.values():
        p.grad = None
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    held = {_place(tensor) for tensor in (*parameters.values(), *buffers.values())}
    activations = sum(size for place, size in kept.items() if place not in held)
    moments = 3 * _bytes(own.values())  # a gradient and two moments
    return Cost(
        trainable=sum(p.numel() for p in own.values()),
        parameters=sum(p.numel() for p in parameters.values()),
        peak_bytes=_bytes(parameters.values()) + _bytes(buffers.values()) + moments + activations,
        unused=unused,
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _place(tensor: Tensor) -> int:
    own: Any = tensor
    local: Tensor = own.to_local() if is_sharded(tensor) else tensor
    return local.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
