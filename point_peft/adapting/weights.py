"""Adapted weights in the place of the base's: while a module runs that reads them, or merged for good."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.adapting.adapter import Adapter, calls_at, get_adapter
from point_peft.adapting.memory import Memory
from point_peft.adapting.proving import note_run
from point_peft.adapting.site import SITE, Site, here, hook
from point_peft.errors import AdapterError
from point_peft.parts.base import Call, Part
from point_peft.running.forward import Forward, current_forward
from point_peft.running.nested import Args
from point_peft.running.reading import enter, leave


@hook
def begin_reading(module: nn.Module, args: Args) -> None:
    """While this module runs, it reads the adapted weights of others."""
    site, forward = here(module)
    adapted = _read_weights(forward, site)
    if adapted:
        forward.second.acted = True
        # What Ctrl-C leaves behind dies with its forward.
        enter(module, adapted, lambda: current_forward(site.root) is forward)


@hook
def end_reading(module: nn.Module, args: Args, output: Any) -> None:
    site: Site = module.__dict__[SITE]
    used = leave(module) or ()
    forward = current_forward(site.root)
    if forward.ran is None or output is None:
        return
    for name in forward.active:
        for path in get_adapter(forward.root, name).readers.get(site.path, ()):
            if path in used:
                for part, call in calls_at(forward, (name,), path, forward.root.base_model.get_submodule(path)):
                    note_run(forward, part, call)


def _read_weights(forward: Forward, site: Site) -> dict[int, tuple[str, Tensor]]:
    """The tensors that the module of a site reads of others: id of the base's -> the other's path and the adapted."""
    adapted: dict[int, tuple[str, Tensor]] = {}
    readers = [get_adapter(forward.root, name).readers for name in forward.active]
    for path in dict.fromkeys(path for own in readers for path in own.get(site.path, ())):
        module = forward.root.base_model.get_submodule(path)
        calls = [(part, call) for part, call in calls_at(forward, forward.active, path, module) if part.by_weight]
        adapted |= {id(base): (path, value) for base, value in adapted_tensors(module, calls).values()}
    return adapted


def adapted_tensors(module: nn.Module, calls: Sequence[tuple[Part, Call]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A module's tensors by name, those of the base and with parts folded in, for those that they change."""
    adapted: dict[str, tuple[Tensor, Tensor]] = {}
    for part, _ in calls:
        for name, value in part.weights(module).items():
            base = getattr(module, name)
            before, value = adapted.get(name, (base, base))[1], value.to(base.dtype)
            adapted[name] = base, value if before is base else before + (value - base)
    return adapted


def folded(base: nn.Module, name: str, adapter: Adapter, *, beside_own: bool = False) -> dict[str, Tensor]:
    """The values of the backbone's tensors, by name, with an adapter in them; an error says why there are none.

    `beside_own` leaves modules of the adapter's own, such as its heads, out of account.
    """
    parts = [(path, part) for path, part in adapter.all_parts() if part.own_module is None]
    for path, part in parts:
        if not part.mergeable:
            raise AdapterError(
                f"adapter '{name}' cannot be merged: its {type(part).__name__} at '{path}' "
                f"({adapter.config.tuners[part.tuner].method}) is not a change of the backbone's weights"
            )
    if any(state.in_forward for state in adapter.shared_states()):
        raise AdapterError(f"adapter '{name}' cannot be merged: it has state that does not belong to a module")
    for path, part in () if beside_own else adapter.all_parts():
        if part.own_module is not None:
            raise AdapterError(
                f"adapter '{name}' cannot be merged: its own '{path}' is not a change of the backbone's weights; "
                "merge_and_unload() puts it in the place of the backbone's, merge() needs an adapter without any, "
                "modules_to_save=[]"
            )
    values: dict[str, Tensor] = {}
    memory = Memory(base)
    for path, part in parts:
        module = base.get_submodule(path)
        for own, value in part.weights(module).items():
            key = f"{path}.{own}"
            if module._parameters.get(own) is None:
                raise AdapterError(
                    f"adapter '{name}' cannot be merged: '{key}' is no parameter (any more), but made of others, as by "
                    "pruning or a parametrization"
                )
            others = memory.others(module, own)
            if others:
                raise AdapterError(
                    f"adapter '{name}' cannot be merged: '{key}' is the same memory as '{others[0]}', which would "
                    "change with it"
                )
            if not bool(torch.isfinite(value).all()):
                raise AdapterError(f"merging '{name}' would give '{key}' values that are not finite")
            if key in values:
                raise AdapterError(f"adapter '{name}' cannot be merged: two of its parts change '{key}'")
            values[key] = value.detach()
    return values


def place_own_modules(base: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's own modules in the places of the backbone's, whose type, mode and `requires_grad` they take."""
    for path, part in adapter.all_parts():
        own = part.own_module
        if own is None:
            continue
        old = base.get_submodule(path)
        like = next((p for p in (*old.parameters(), *base.parameters()) if p.is_floating_point()), None)
        own.to(like).train(old.training).requires_grad_(all(p.requires_grad for p in old.parameters()))
        for parent in list(base.modules()):
            for name in [name for name, child in parent._modules.items() if child is old]:
                parent._modules[name] = own


def overwrite_weights(base: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write values into the backbone's tensors; returns those that were there."""
    before = {name: base.get_parameter(name).detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            base.get_parameter(name).copy_(value)
    return before
