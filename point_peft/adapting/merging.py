"""Fold an adapter into the weights of its backbone, and take it out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from point_peft.adapting.adapter import Adapter
from point_peft.errors import AdapterError


def folded(base: nn.Module, name: str, adapter: Adapter) -> dict[str, Tensor]:
    """The values of the backbone's tensors, by name, with an adapter in them; an error says why there are none."""
    for path, part in adapter.all_parts():
        if not part.mergeable:
            raise AdapterError(
                f"adapter '{name}' cannot be merged: its {type(part).__name__} at '{path}' "
                f"({adapter.config.tuners[part.tuner].method}) is not a change of the backbone's weights"
            )
    if any(adapter.shared_states()):
        raise AdapterError(f"adapter '{name}' cannot be merged: it has state that does not belong to a module")
    values: dict[str, Tensor] = {}
    for path, part in adapter.all_parts():
        for own, value in part.weights(base.get_submodule(path)).items():
            key = f"{path}.{own}"
            if not bool(torch.isfinite(value).all()):
                raise AdapterError(f"merging '{name}' would give '{key}' values that are not finite")
            if key in values:
                raise AdapterError(f"adapter '{name}' cannot be merged: two of its parts change '{key}'")
            values[key] = value.detach()
    return values


def copied(base: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the backbone's tensors, by name."""
    return {name: base.get_parameter(name).detach().clone() for name in names}


def write(base: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the backbone's tensors other values, by name."""
    with torch.no_grad():
        for name, value in values.items():
            base.get_parameter(name).copy_(value)
