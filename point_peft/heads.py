"""Modules that an adapter has to itself: a trained copy of a module of the base, or a head of another shape.

A head made of standard layers is described in the adapter's configuration, so that it can be built again without the
code that first made it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from point_peft import tokens as token_ops
from point_peft.anatomy import Stage, linear_shape
from point_peft.errors import AdapterError, AdapterFileError, AnatomyError, quoted
from point_peft.tokens import Args, Kwargs
from point_peft.tuners.base import Backbone, Call, Part, TunedModule

HeadSource = nn.Module | Callable[[], nn.Module] | str
"""A head, a function without arguments that makes one, or the name of a pooled head: see `PooledHead`."""
POOLS = ("cls", "max", "mean", "prompt", "all_max", "all_mean", "raw_mean", "feature")
"""What a head can pool, after the final norm: the first prefix token; the maximum or mean over the patch tokens; the
mean over the prompts that a method leaves in the sequence to its end; the maximum over patches and such prompts; the
mean over all tokens, prefix too; the same ahead of the final norm; a feature of the cloud that a method offers."""

# Layers that a file may ask for.
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
_MAX_LAYERS = 256
_MAX_SIZE = 2**20


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIZE


def _is_sizes(value: Any) -> bool:
    return all(map(_is_size, value)) and 0 < len(value) <= 8 if isinstance(value, list) else _is_size(value)


def _is_padding(value: Any) -> bool:
    entries = value if isinstance(value, list) else [value]
    return value in ("same", "valid") or all(type(entry) is int and 0 <= entry <= _MAX_SIZE for entry in entries)


def _is_dimension(value: Any) -> bool:
    return value is None or (type(value) is int and abs(value) < 8)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# What the constructor arguments of the layers may be.
_ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("in_features", "out_features", "in_channels", "out_channels", "groups"), _is_size),
    **dict.fromkeys(("num_features", "num_channels", "num_groups"), _is_size),
    **dict.fromkeys(("kernel_size", "stride", "dilation", "normalized_shape"), _is_sizes),
    **dict.fromkeys(("bias", "affine", "elementwise_affine", "track_running_stats", "inplace"), _is_bool),
    **dict.fromkeys(("dim", "start_dim", "end_dim"), _is_dimension),
    **dict.fromkeys(("eps", "p", "negative_slope"), _is_number),
    "momentum": lambda value: value is None or _is_number(value),
    "padding": _is_padding,
    "padding_mode": lambda value: value in ("zeros", "reflect", "replicate", "circular"),
    "approximate": lambda value: value in ("none", "tanh"),
}


class OwnModule(TunedModule):
    """A head of the adapter's own, or a module of `modules_to_save`."""


class PooledHead(nn.Sequential):
    """Layers on pooled tokens, c channels for each entry of `pool`; it stands in for the backbone's head.

    `pool` joins names of `POOLS` by "+": "cls+max" is the head of Point-MAE (2C), "cls+prompt+max" that of IDPT and
    DAPT (3C). Whatever the backbone pools itself is not used.
    """

    def __init__(self, pool: str, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.pool = "+".join(split_pool(pool))


def mlp_head(
    channels: int,
    num_classes: int,
    pool: str,
    *,
    hidden: int = 256,
    dropout: float = 0.5,
    activation: type[nn.Module] = nn.ReLU,
) -> PooledHead:
    """The head of most point-cloud methods: three linear layers with BatchNorm and dropout on pooled tokens."""
    return PooledHead(
        pool,
        nn.Linear(channels * len(split_pool(pool)), hidden),
        nn.BatchNorm1d(hidden),
        activation(),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        activation(),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )


def split_pool(pool: str) -> tuple[str, ...]:
    """The names that a pooled head joins."""
    names = tuple(pool.split("+"))
    wrong = [name for name in names if name not in POOLS]
    if wrong or len(set(names)) != len(names):
        raise AdapterError(f"a head pools {quoted(pool)}; allowed: different ones of {', '.join(POOLS)}, joined by '+'")
    return names


class PooledModule(OwnModule):
    """A pooled head at the base's head: it takes what `PooledTokens` noted instead of what the base has pooled."""

    module: PooledHead

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        notes, names = call.forward.notes, split_pool(self.module.pool)
        if "feature" in names:
            offered = call.forward.left(call.adapter, "feature")
            if len(offered) != 1:
                raise AdapterError(
                    f"the head at '{call.path}' pools 'feature', and {len(offered)} of the adapter's methods offer one"
                )
            notes[call.adapter, "pooled", "feature"] = offered[0]
        return self.module(torch.cat([notes[call.adapter, "pooled", name].to(output.dtype) for name in names], dim=1))


class PooledTokens(Part):
    """At the final norm, or where there is none at the last block: notes what a pooled head takes of all tokens.

    Prompts that a method leaves in the sequence to its end pass through the norm with the others.
    """

    needs_coordinates = True

    def __init__(self, stage: Stage, number: int, pool: str, *, at_block: bool) -> None:
        super().__init__()
        self.stage = stage
        self.number = number
        self.names = split_pool(pool)
        self.at_block = at_block

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        prompts = call.forward.left(call.adapter, "prompts")
        if self.at_block or not prompts:
            return args, kwargs
        tokens = token_ops.batch_first(args[0], self.stage.layout)
        joined = torch.cat([tokens, *(prompt.to(tokens.dtype) for prompt in prompts)], dim=1)
        return (token_ops.as_layout(joined, self.stage.layout), *args[1:]), kwargs

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        left = call.forward.left(call.adapter, "prompts")
        found = token_ops.output_tokens(self.stage, call.path, output) if self.at_block else output
        tokens = token_ops.batch_first(found, self.stage.layout)
        count = sum(prompts.shape[1] for prompts in left)
        if self.at_block:
            tokens = torch.cat([tokens, *(prompts.to(tokens.dtype) for prompts in left)], dim=1)
        own, prompts = torch.split(tokens, [tokens.shape[1] - count, count], dim=1)
        ahead = tokens if self.at_block else token_ops.batch_first((*args, *kwargs.values())[0], self.stage.layout)
        self._note(call, own, prompts, ahead)
        return output if self.at_block else token_ops.as_layout(own, self.stage.layout)

    def _note(self, call: Call, own: Tensor, prompts: Tensor, ahead: Tensor) -> None:
        g = call.forward.coordinates[self.number].shape[1]
        patches = own[:, own.shape[1] - g :]
        if ("prompt" in self.names or "all_max" in self.names) and not prompts.shape[1]:
            raise AdapterError(
                "a head pools prompts, and none of the adapter's methods leaves any in the sequence to its end: use a "
                f"method that does, or a head of {', '.join(name for name in POOLS if name != 'prompt')}"
            )
        pools: dict[str, Callable[[], Tensor]] = {
            "cls": lambda: own[:, 0],
            "max": lambda: patches.amax(dim=1),
            "mean": lambda: patches.mean(dim=1),
            "prompt": lambda: prompts.mean(dim=1),
            "all_max": lambda: torch.cat([patches, prompts], dim=1).amax(dim=1),
            "all_mean": lambda: torch.cat([own, prompts], dim=1).mean(dim=1),
            "raw_mean": lambda: ahead.mean(dim=1),
        }
        for name in self.names:
            if name in pools:
                call.forward.notes[call.adapter, "pooled", name] = pools[name]()


def make_head(source: HeadSource, path: str, backbone: Backbone) -> nn.Module:
    """The head that a `heads` argument gives for a module path. A module is copied: each adapter has its own."""
    if isinstance(source, nn.Module):
        return copy.deepcopy(source)
    if isinstance(source, str):
        return _named_head(source, path, backbone)
    if not callable(source):
        raise AdapterError(
            f"heads[{path!r}] must be an nn.Module, a function that makes one, or the name of a pooled head, not "
            f"{quoted(source)}"
        )
    head = source()
    if not isinstance(head, nn.Module):
        raise AdapterError(f"heads[{path!r}] must give an nn.Module, it gave a {type(head).__name__}")
    return head


def _named_head(pool: str, path: str, backbone: Backbone) -> PooledHead:
    """A pooled head with as many classes as the head of the base that it stands in for."""
    shapes = [shape for module in backbone.modules[path].modules() if (shape := linear_shape(module))]
    if not shapes:
        raise AdapterError(
            f"heads[{path!r}]={pool!r} takes the number of classes from the last linear layer there, and "
            f"'{path}' has none: pass heads.mlp_head(...)"
        )
    return mlp_head(backbone.known_anatomy("a pooled head").stages[-1].width, shapes[-1][0], pool)


def place_head(head: nn.Module, path: str, backbone: Backbone) -> list[tuple[str, Part]]:
    """The parts, by site, that a module of the adapter's own needs to stand in for that of the base."""
    if not isinstance(head, PooledHead):
        return [(path, OwnModule(head))]
    anatomy = backbone.known_anatomy("a pooled head")
    stage, norms = anatomy.stages[-1], anatomy.final_norms
    if stage.layout == "packed" or stage.coordinates is None or len(norms) > 1:
        why = (
            "its tokens are packed"
            if stage.layout == "packed"
            else "it has several final norms"
            if len(norms) > 1
            else "the coordinates of its tokens, by which they are counted, are not known"
        )
        raise AnatomyError(
            f"the head {head.pool!r} at '{path}' pools the tokens of {type(backbone.model).__name__} itself, and "
            f"cannot: {why}. Pass a module that takes what the base has pooled"
        )
    site = norms[0] if norms else stage.blocks[-1].path
    noting = PooledTokens(stage, len(anatomy.stages) - 1, head.pool, at_block=not norms)
    return [(site, noting), (path, PooledModule(head))]


# ---- describing ------------------------------------------------------------------------------------------------------


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
    name = type(head).__name__
    if _LAYERS.get(name) is not type(head):
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
    """What the constructor of a layer takes, but for where and as what its tensors are made."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = inspect.signature(_LAYERS[layer]).parameters
    return {name: p for name, p in taken.items() if p.kind in named and name not in ("device", "dtype")}


# ---- building --------------------------------------------------------------------------------------------------------


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
