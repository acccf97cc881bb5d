"""Modules that an adapter has to itself: a trained copy of a module of the base, or a head of another shape.

A head made of standard layers is described in the adapter's configuration, so that it can be built again without the
code that first made it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from point_peft.errors import AdapterError, AdapterFileError
from point_peft.tuners.base import Args, Call, Kwargs, Part

HeadSource = nn.Module | Callable[[], nn.Module]
"""A head, or a function without arguments that makes one."""

# Layers that a file may ask for, each with the constructor arguments that describe it.
_LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer
    for layer in (
        nn.Linear,
        nn.Conv1d,
        nn.BatchNorm1d,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.Dropout,
        nn.ReLU,
        nn.LeakyReLU,
        nn.GELU,
        nn.SiLU,
        nn.Tanh,
        nn.Sigmoid,
        nn.Softmax,
        nn.LogSoftmax,
        nn.Flatten,
        nn.Identity,
    )
}
_SIMPLE = (bool, int, float, str)
_MAX_LAYERS = 256
_MAX_WIDTH = 2**20


class OwnModule(Part):
    """A module of the adapter's own, whose output replaces that of the base's module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return self.module(*args, **kwargs)

    def file_name(self, name: str) -> str:
        return name.removeprefix("module.")


def make_head(source: HeadSource, path: str) -> nn.Module:
    """The head that a `heads` argument gives for a module path."""
    head = source if isinstance(source, nn.Module) else source()
    if not isinstance(head, nn.Module):
        raise AdapterError(f"heads[{path!r}] must give an nn.Module, it gave a {type(head).__name__}")
    return head


def describe_head(head: nn.Module) -> dict[str, Any] | None:
    """A head as JSON values, None if it is not made of standard layers alone."""
    if type(head) is nn.Sequential:
        layers = {name: describe_head(child) for name, child in head.named_children()}
        return None if None in layers.values() else {"layer": "Sequential", "layers": layers}
    name = type(head).__name__
    if _LAYERS.get(name) is not type(head):
        return None
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(_LAYERS[name]).parameters.values():
        if parameter.name in ("device", "dtype"):
            continue
        value = getattr(head, parameter.name, parameter.default)
        if parameter.name in ("bias", "elementwise_affine") and not isinstance(value, bool):
            value = value is not None
        if isinstance(value, tuple) and all(isinstance(entry, int) for entry in value):
            value = list(value)
        elif value is not None and not isinstance(value, _SIMPLE):
            return None
        arguments[parameter.name] = value
    return {"layer": name, "arguments": arguments}


def build_head(description: Any, path: str) -> nn.Module:
    """The head that `describe_head` described; anything else raises `AdapterFileError`."""
    return _build(description, path, [_MAX_LAYERS])


def _build(description: Any, path: str, left: list[int]) -> nn.Module:
    left[0] -= 1
    if left[0] < 0:
        raise AdapterFileError(f"the head '{path}' has more than {_MAX_LAYERS} layers")
    if not isinstance(description, Mapping) or not isinstance(description.get("layer"), str):
        raise AdapterFileError(f"the description of the head '{path}' is not one: {str(description)[:80]}")
    name = description["layer"]
    if name == "Sequential" and isinstance(description.get("layers"), Mapping):
        head = nn.Sequential()
        for child, layer in description["layers"].items():
            if not child or "." in child:
                raise AdapterFileError(f"the head '{path}' has a layer of the invalid name {child!r}")
            head.add_module(child, _build(layer, path, left))
        return head
    arguments = description.get("arguments")
    if name not in _LAYERS or not isinstance(arguments, Mapping):
        raise AdapterFileError(f"the head '{path}' asks for a layer {name!r}; known layers: {', '.join(_LAYERS)}")
    known = set(inspect.signature(_LAYERS[name]).parameters) - {"device", "dtype", "inplace"}
    sizes = [value for entry in arguments.values() for value in (entry if isinstance(entry, Sequence) else [entry])]
    if not set(arguments) <= known | {"inplace"} or any(type(v) is int and abs(v) > _MAX_WIDTH for v in sizes):
        raise AdapterFileError(f"the head '{path}' asks for a {name} with arguments {str(dict(arguments))[:120]}")
    try:
        return _LAYERS[name](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"the head '{path}': {name} cannot be made: {error}") from error
