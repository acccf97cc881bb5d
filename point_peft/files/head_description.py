"""Heads of standard layers as JSON values, and built from them."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from point_peft.adapting.heads import PooledHead
from point_peft.errors import AdapterError, AdapterFileError, quoted
from point_peft.schema import fits

# Layers that a file may ask for.
_NAMES = (
    *("Linear", "Conv1d", "BatchNorm1d", "LayerNorm", "GroupNorm", "Dropout", "ReLU", "LeakyReLU", "GELU", "SiLU"),
    *("Tanh", "Sigmoid", "Softmax", "LogSoftmax", "Flatten", "Identity"),
)
_LAYERS: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in _NAMES}
_MAX_LAYERS = 256
_MAX_SIZE = 2**20


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIZE


def _is_sizes(value: Any) -> bool:
    return all(map(_is_size, value)) and 0 < len(value) <= 8 if isinstance(value, list) else _is_size(value)


def _is_padding(value: Any) -> bool:
    entries = value if isinstance(value, list) else [value]
    return value in ("same", "valid") or all(type(entry) is int and 0 <= entry <= _MAX_SIZE for entry in entries)


# What the constructor arguments of the layers may be.
_ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("in_features", "out_features", "in_channels", "out_channels", "groups"), _is_size),
    **dict.fromkeys(("num_features", "num_channels", "num_groups"), _is_size),
    **dict.fromkeys(("kernel_size", "stride", "dilation", "normalized_shape"), _is_sizes),
    **dict.fromkeys(("bias", "affine", "elementwise_affine", "track_running_stats"), partial(fits, hint=bool)),
    **dict.fromkeys(("dim", "start_dim", "end_dim"), lambda d: d is None or (type(d) is int and abs(d) < 8)),
    **dict.fromkeys(("eps", "p", "negative_slope"), partial(fits, hint=float)),
    "inplace": partial(fits, hint=bool),
    "momentum": partial(fits, hint=float | None),
    "padding": _is_padding,
    "padding_mode": partial(fits, hint=Literal["zeros", "reflect", "replicate", "circular"]),
    "approximate": partial(fits, hint=Literal["none", "tanh"]),
}


def describe_head(head: nn.Module) -> dict[str, Any]:
    """A head as JSON values, from which `build_head` builds it again.

    What is not made of standard layers alone is told by class and tensors, enough to see whether a module is like it.
    """
    tied = len(list(head.named_parameters(remove_duplicate=False))) != len(list(head.parameters()))
    return _describe_class(head) if tied else _describe(head)


def _describe(head: nn.Module) -> dict[str, Any]:
    if head._forward_hooks or head._forward_pre_hooks:
        return _describe_class(head)
    if type(head) in (nn.Sequential, PooledHead):
        # A list, because the order counts, and every child, because an activation may stand in it twice.
        layers = [[name, _describe(child)] for name, child in head._modules.items() if child is not None]
        pooled = {"pool": head.pool} if isinstance(head, PooledHead) else {}
        return {"layer": type(head).__name__, "layers": layers, **pooled}
    return _describe_layer(head) or _describe_class(head)


def _describe_class(head: nn.Module) -> dict[str, Any]:
    return {"class": type(head).__qualname__, "tensors": _shapes(head)}


def _describe_layer(head: nn.Module) -> dict[str, Any] | None:
    """A standard layer, None if it is not one or building it again would not give the same tensors."""
    # What norms are converted to for several processes holds and computes the same.
    kind = nn.BatchNorm1d if type(head) is nn.SyncBatchNorm else type(head)
    name = kind.__name__
    if _LAYERS.get(name) is not kind:
        return None
    arguments: dict[str, Any] = {}
    for parameter in _parameters(name).values():
        value = getattr(head, parameter.name, parameter.default)
        if parameter.name in ("bias", "elementwise_affine") and not isinstance(value, bool):
            value = value is not None
        value = list(value) if isinstance(value, tuple) else value
        if parameter.name in _ARGUMENTS and _ARGUMENTS[parameter.name](value):
            arguments[parameter.name] = value
        elif value is not parameter.default:
            return None
    try:
        with torch.device("meta"):
            like = _LAYERS[name](**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError):
        return None
    return {"layer": name, "arguments": arguments} if _shapes(like) == _shapes(head) else None


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}


def _parameters(layer: str) -> dict[str, inspect.Parameter]:
    """The parameters of the constructor of a layer, but for where and as what its tensors are made."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = inspect.signature(_LAYERS[layer]).parameters
    return {name: p for name, p in taken.items() if p.kind in named and name not in ("device", "dtype")}


def build_head(description: Any, path: str) -> nn.Module:
    """The head that `describe_head` described; anything else raises `AdapterFileError`.

    Its size is what the description says: build it on the meta device to see first whether it fits the file's tensors.
    """
    return _build(description, path, [_MAX_LAYERS])


def _container(description: Mapping[str, Any], path: str) -> nn.Sequential:
    """The container that a description asks for, still without layers."""
    if set(description) == {"layer", "layers"} and description["layer"] == "Sequential":
        return nn.Sequential()
    pool = description.get("pool")
    if set(description) != {"layer", "layers", "pool"} or not isinstance(pool, str):
        raise AdapterFileError(f"the description of the head '{path}' is not one: {quoted(description)}")
    try:
        return PooledHead(pool)
    except AdapterError as error:
        raise AdapterFileError(f"the head '{path}': {error}") from error


def _build(description: Any, path: str, left: list[int]) -> nn.Module:
    left[0] -= 1
    if left[0] < 0:
        raise AdapterFileError(f"the head '{path}' has more than {_MAX_LAYERS} layers")
    if isinstance(description, Mapping) and isinstance(description.get("class"), str):
        raise AdapterFileError(
            f"the head '{path}' is a {quoted(description['class'])}, which a file cannot describe and this model has "
            f"not there: pass heads={{'{path}': module}}"
        )
    if not isinstance(description, Mapping) or not isinstance(description.get("layer"), str):
        raise AdapterFileError(f"the description of the head '{path}' is not one: {quoted(description)}")
    name = description["layer"]
    if name in ("Sequential", "PooledHead") and isinstance(description.get("layers"), list):
        head = _container(description, path)
        for entry in description["layers"]:
            if not isinstance(entry, list) or len(entry) != 2:
                raise AdapterFileError(f"the head '{path}' has a layer {quoted(entry)}: not a name and a layer")
            child, layer = entry
            if not isinstance(child, str) or not child or "." in child or hasattr(head, child):
                raise AdapterFileError(f"the head '{path}' has a layer of the invalid name {quoted(child)}")
            head.add_module(child, _build(layer, path, left))
        return head
    arguments = description.get("arguments")
    if name not in _LAYERS or set(description) != {"layer", "arguments"} or not isinstance(arguments, Mapping):
        raise AdapterFileError(f"the head '{path}' asks for a layer {quoted(name)}; known layers: {', '.join(_LAYERS)}")
    known = _parameters(name)
    for argument, value in arguments.items():
        if argument not in known or argument not in _ARGUMENTS:
            raise AdapterFileError(f"the head '{path}': {name} has no argument {quoted(argument)}")
        if not _ARGUMENTS[argument](value):
            raise AdapterFileError(f"the head '{path}': {name} cannot have {argument}={quoted(value)}")
    try:
        return _LAYERS[name](**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = quoted(str(error), 200)[1:-1]
        raise AdapterFileError(f"the head '{path}': {name} cannot be made: {reason}") from error
