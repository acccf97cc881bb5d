"""An adapter made of several others, each with a weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.planning import build_adapter
from point_peft.config import METHODS, Combination, PeftConfig
from point_peft.errors import AdapterError, PointPeftError, quoted
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Part
from point_peft.schema import fits


def combine(
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    combination: Combination,
    backbone_for: Callable[[PeftConfig], Backbone],
) -> Adapter:
    """The weighted combination of adapters, complete but not attached; their one method says how it is made."""
    _check(adapters, weights)
    weights = [float(weight) for weight in weights]  # an int may be too large for a tensor
    first = next(iter(adapters.values()))
    changes = {name: adapter.weight_changes() for name, adapter in adapters.items()}
    for name, parts in changes.items():
        for path, part in parts.items():
            if not _finite(part):
                raise AdapterError(f"adapter '{name}' has values at '{path}' that are not finite")
    tuner, tensors = first.config.tuners[0].combined(changes, weights, combination)
    _check_own_modules(adapters)
    config = replace(first.config, tuners=(tuner,))
    combined = build_adapter(backbone_for(config), config, dict(first.own_modules()), first.saved)
    for path, part in combined.weight_changes().items():
        part.load_state_dict(tensors[path])
        if not _finite(part):
            raise AdapterError(f"weights {list(weights)} give values at '{path}' that are not finite")
    combined.requires_grad_(False)
    return combined


def _finite(part: Part) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in part.parameters())


def _check(adapters: Mapping[str, Adapter], weights: Sequence[float]) -> None:
    if not adapters:
        raise AdapterError("an empty list of adapters cannot be combined: name at least one")
    numbers = [weight for weight in weights if fits(weight, float)]
    if len(numbers) != len(weights) or len(weights) != len(adapters):
        raise PointPeftError(
            f"weights is {quoted(list(weights))}; allowed: a finite number for each of the {len(adapters)} adapters"
        )
    able = sorted(name for name, method in METHODS.items() if method.combines)
    for name, adapter in adapters.items():
        methods = [tuner.method for tuner in adapter.config.tuners]
        if len(methods) > 1 or methods[0] not in able:
            raise AdapterError(
                f"adapter '{name}' ({', '.join(methods)}) cannot be combined: only {' or '.join(able)} alone can"
            )


def _check_own_modules(adapters: Mapping[str, Adapter]) -> None:
    """All must have equal modules of their own, since these do not add up."""
    (first, head), *others = adapters.items()
    wanted = _own_tensors(head)
    for name, adapter in others:
        own = _own_tensors(adapter)
        unlike = sorted(set(own) ^ set(wanted)) or [key for key in own if not _same(own[key], wanted[key])]
        if unlike:
            raise AdapterError(
                f"adapters '{first}' and '{name}' have modules of their own that differ in '{unlike[0]}', and these "
                "cannot be combined: train with modules_to_save=[], or give them the same heads"
            )


def _own_tensors(adapter: Adapter) -> dict[str, Tensor]:
    own = [(path, module.state_dict(keep_vars=True)) for path, module in adapter.own_modules()]
    return {f"{path}.{name}": tensor for path, tensors in own for name, tensor in tensors.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
