"""Adapters by name: which names are allowed, and which adapters are meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.errors import AdapterError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,99}")


def check_new_name(adapters: nn.ModuleDict, name: str) -> None:
    """Refuse what cannot be the name of a further adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r} is not valid: at most 100 letters, digits, '_' and '-', the first not '-'"
        )
    if name in adapters._modules:
        raise AdapterError(f"there is an adapter '{name}' already: delete it first or choose another name")


def all_adapters(adapters: nn.ModuleDict) -> dict[str, Adapter]:
    """Every adapter by name, in the order in which they were added."""
    return {name: adapter for name, adapter in adapters._modules.items() if isinstance(adapter, Adapter)}


def named_adapter(adapters: nn.ModuleDict, name: str) -> Adapter:
    """The adapter of that name; if there is none, the error says which there are."""
    adapter = adapters._modules.get(name) if isinstance(name, str) else None
    if not isinstance(adapter, Adapter):
        known = ", ".join(f"'{other}'" for other in adapters) or "none"
        raise AdapterError(f"there is no adapter {name!r}; adapters: {known}")
    return adapter


def meant_names(adapters: nn.ModuleDict, names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The adapters that a name or a list of names means, each of which exists; None means all."""
    if names is None:
        return tuple(adapters)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        named_adapter(adapters, name)
    if len(set(chosen)) != len(chosen):
        raise AdapterError(f"an adapter is named twice in {list(chosen)}")
    return chosen


def single_name(adapters: nn.ModuleDict, active: Sequence[str], name: str | None) -> str:
    """The one adapter that is meant; None means the active one."""
    if name is not None:
        named_adapter(adapters, name)
        return name
    if len(active) != 1:
        raise AdapterError(f"name one adapter: active are {list(active)}, present {list(adapters)}")
    return active[0]


def task_names(adapters: nn.ModuleDict, names: Sequence[str | None]) -> tuple[str | None, ...]:
    """The adapters, each of which exists, that take turns; None is the plain backbone."""
    if isinstance(names, str) or not names:
        raise AdapterError(f"name adapters in a list, None for the plain backbone; got {names!r}")
    for name in names:
        if name is not None:
            named_adapter(adapters, name)
    return tuple(names)


def check_unmerged(merged: Collection[str], what: str) -> None:
    """Refuse to do what cannot be done while an adapter is merged; `what` begins the sentence."""
    if merged:
        raise AdapterError(f"{what} while '{next(iter(merged))}' is merged into the backbone: call unmerge() first")
