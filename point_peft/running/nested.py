"""Tensors in nested tuples, lists, mappings, records and sparse tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from point_peft.anatomy.description import Steps

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@runtime_checkable
class SparseTensor(Protocol):
    """A sparse tensor of convolutions (spconv and the like): features (n, c), which are replaced in a copy."""

    features: Tensor

    def replace_feature(self, feature: Tensor) -> SparseTensor: ...


@runtime_checkable
class Record(Protocol):
    """A thing that holds tensors by name and says which: torch_geometric's Data and the like."""

    def to_dict(self) -> dict[str, Any]: ...


def call_arguments(inputs: Any) -> tuple[Args, Kwargs]:
    """The arguments that a tensor, a tuple of positional or a dict of named ones stands for."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def leaves(value: Any, steps: Steps = ()) -> Iterator[tuple[Steps, Tensor]]:
    """Every tensor in nested tuples, lists, mappings and sparse tensors, with the steps that lead to it."""
    if isinstance(value, Tensor):
        yield steps, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield from leaves(item, (*steps, key))
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from leaves(item, (*steps, number))
    elif isinstance(value, Record) or _is_dataclass(value):
        yield from leaves(dict(_entries(value)), steps)
    elif isinstance(value, SparseTensor):
        yield (*steps, "features"), value.features


def _is_dataclass(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a record or dataclass."""
    if isinstance(value, Record):
        yield from value.to_dict().items()
    else:
        for item in fields(value):
            yield item.name, getattr(value, item.name)


def fetch(value: Any, steps: Steps) -> Any:
    """The value that the steps lead to, None if they lead nowhere."""
    for step in steps:
        if isinstance(step, int):
            value = value[step] if isinstance(value, (tuple, list)) and step < len(value) else None
        elif isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, Record) or _is_dataclass(value):
            value = dict(_entries(value)).get(step)
        else:
            value = value.features if isinstance(value, SparseTensor) and step == "features" else None
    return value


def put(value: Any, steps: Steps, new: Tensor) -> Any:
    """`value` with `new` where the steps lead.

    Tuples, dataclasses and sparse tensors are copied. Lists and mappings are changed in place: a model may hold them
    elsewhere too.
    """
    if not steps:
        return new
    step, *rest = steps
    # A mapping first: some have every attribute that they are asked for.
    if step == "features" and not isinstance(value, Mapping) and isinstance(value, SparseTensor):
        return value.replace_feature(new)
    inner = put(fetch(value, (step,)), tuple(rest), new)
    if isinstance(value, tuple) and isinstance(step, int):
        changed = [*value[:step], inner, *value[step + 1 :]]
        return type(value)(*changed) if type(value) is not tuple else tuple(changed)
    if _is_dataclass(value):
        return replace(value, **{str(step): inner})
    value[step] = inner
    return value


def fetch_argument(args: Args, kwargs: Kwargs, steps: Steps) -> Any:
    """The value that the steps lead to in the arguments of a call."""
    first, *rest = steps
    if isinstance(first, int):
        return fetch(args, steps)
    return fetch(kwargs.get(first), tuple(rest))


def put_argument(args: Args, kwargs: Kwargs, steps: Steps, new: Tensor) -> tuple[Args, Kwargs]:
    """The arguments of a call with `new` where the steps lead; lists and mappings in them are copied first."""
    first, *rest = steps
    if isinstance(first, int):
        inner = put(_shallow(args[first]) if rest else None, tuple(rest), new)
        return (*args[:first], inner, *args[first + 1 :]), kwargs
    return args, {**kwargs, first: put(_shallow(kwargs[first]) if rest else None, tuple(rest), new)}


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (list, Mapping)) else value


def all_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Steps, Tensor]]:
    """Every tensor among the arguments of a call, with the steps that lead to it."""
    yield from leaves(tuple(args))
    yield from leaves(kwargs)
