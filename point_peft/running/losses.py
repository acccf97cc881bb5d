"""Auxiliary losses: what the parts of a forward add to the training loss, kept until the next forward."""

from typing import Protocol

import torch
from torch import Tensor

from point_peft.running.activation import Key, PerModel


class Owner(Protocol):
    """The module that holds the adapters, as far as losses need it."""

    key: Key
    losses: tuple[Tensor, ...]


_losses: PerModel[tuple[Tensor, ...]] = PerModel("point_peft_losses")


def keep_losses(root: Owner, losses: list[Tensor]) -> None:
    """Keep the losses of a forward of this thread or task in the place of the last one's."""
    if torch.compiler.is_compiling():
        root.losses = tuple(losses)
    elif losses or _losses.get(root.key):
        _losses.set(root.key, tuple(losses))


def auxiliary_losses(root: Owner) -> tuple[Tensor, ...]:
    """The losses of the last forward of this thread or task."""
    return _losses.get(root.key) or root.losses


def forget_losses(root: Owner) -> None:
    """Let go of the losses that this thread or task keeps."""
    root.losses = ()
    _losses.set(root.key, None)
