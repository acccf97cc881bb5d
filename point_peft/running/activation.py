"""Activation: which adapters are active, and what else holds for one thread or asyncio task only.

Context variables keep it, so that threads and tasks do not see each other. `torch.compile` cannot read those; what is
traced asks the model itself.
"""

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class Key:
    """The identity of an adapted model: shared with its DataParallel replicas, new in a deep copy or a pickle."""


class PerModel(Generic[T]):
    """A context-local value for every adapted model; models that are gone leave nothing behind."""

    def __init__(self, name: str) -> None:
        self._values: ContextVar[Mapping[Key, T] | None] = ContextVar(name, default=None)

    def get(self, key: Key) -> T | None:
        values = self._values.get()
        return None if values is None else values.get(key)

    def set(self, key: Key, value: T | None) -> None:
        values = weakref.WeakKeyDictionary(self._values.get() or {})
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
        self._values.set(values)


class Chooser(Protocol):
    """The module that holds the adapters, as far as activation needs it."""

    key: Key
    default: tuple[str, ...]
    slots: dict[str, nn.Module]


_active: PerModel[tuple[str, ...]] = PerModel("point_peft_active")


def active_adapters(root: Chooser) -> tuple[str, ...]:
    """The adapters that a forward started here would use: this context's choice, else the model's own."""
    if torch.compiler.is_compiling():
        return tuple(root.slots)
    chosen = _active.get(root.key)
    return root.default if chosen is None else chosen


def choose_adapters(root: Chooser, names: tuple[str, ...] | None) -> None:
    """Set this context's choice; None: follow the model's own again."""
    _active.set(root.key, names)


def chosen_adapters(root: Chooser) -> tuple[str, ...] | None:
    """This context's own choice, None if it follows the model's."""
    return _active.get(root.key)
