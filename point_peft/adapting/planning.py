"""Plan an adapter: built and checked, but not attached; the backbone is not changed."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.border import HALF, TRAINED
from point_peft.adapting.heads import Heads, make_own_modules, place_head, pools_of
from point_peft.adapting.memory import Memory
from point_peft.adapting.site import clean_copy, first_names, floating_parameter
from point_peft.anatomy.description import Anatomy
from point_peft.anatomy.structure import Modules
from point_peft.config import PeftConfig
from point_peft.errors import AdapterError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Part
from point_peft.parts.tuned import TunedModule


def build_adapter(
    backbone: Backbone, config: PeftConfig, heads: Heads, saved: Sequence[str] | None = None, *, widen: bool = True
) -> Adapter:
    """An adapter for a backbone, complete but not attached, on the backbone's device.

    Its tensors have the backbone's type, of several the widest, or float32 for half precision if they `widen`. `saved`
    says by full path which modules the adapter has to itself, and `heads` then names them so too.
    """
    adapter = _assemble(backbone, config, heads, saved)
    like = floating_parameter(backbone.modules)
    return adapter if like is None else _typed(adapter.to(like.device), backbone, widen=widen)


def plan_adapter(backbone: Backbone, config: PeftConfig, heads: Heads, saved: Sequence[str], *, widen: bool) -> Adapter:
    """The same without memory for what is new in it: to see names, shapes and types of its tensors beforehand."""
    with torch.device("meta"), _NoNumbers():
        adapter = _assemble(backbone, config, heads, saved)
    like = floating_parameter(backbone.modules)
    return adapter if like is None else _typed(adapter, backbone, widen=widen)


class _NoNumbers(TorchFunctionMode):
    """Leaves out to draw random numbers, for which torch on the meta device first imports for more than a second."""

    drawing = frozenset((Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.drawing:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _assemble(backbone: Backbone, config: PeftConfig, heads: Heads, saved: Sequence[str] | None) -> Adapter:
    """An adapter as its configuration says, where and as what torch makes tensors by default."""
    adapter = Adapter(config)
    own = make_own_modules(backbone, config, heads, saved)
    adapter.saved = tuple(own)
    pooled = frozenset(name for head in own.values() for name in pools_of(head))
    planned = _plan_methods(adapter, replace(backbone, pooled=pooled))
    _check_inside(adapter, planned)
    for path, head in own.items():
        for site, part in place_head(head, path, backbone):
            # First in the list, it sees what all others make of the output.
            planned.setdefault(site, []).insert(0, part)
    memory = functools.cache(lambda: Memory(backbone.model))
    for path, parts in planned.items():
        reader = _plan_reads(backbone, path, parts, memory)
        if reader is not None:
            adapter.readers.setdefault(reader, []).append(path)
        adapter.parts[path.replace(".", "/")] = nn.ModuleList(parts)
    stem = () if backbone.anatomy is None else backbone.anatomy.stem
    adapter.in_stem = frozenset(path for path in stem if any((site + ".").startswith(path + ".") for site in planned))
    adapter.tensors()  # refuses two of one name
    if next(adapter.parameters(), None) is None:
        raise AdapterError(
            "the adapter would have nothing to train: no head was found or none was asked for; name the modules to "
            "train in modules_to_save"
        )
    return adapter


def _plan_methods(adapter: Adapter, backbone: Backbone) -> dict[str, list[Part]]:
    """The parts of the adapter's methods by site; the state that they share goes into the adapter."""
    modules, names = backbone.modules, first_names(backbone.modules)
    planned: dict[str, list[Part]] = {}
    for number, tuner in enumerate(adapter.config.tuners):
        blueprint = tuner.build(backbone)
        adapter.shared.append(nn.ModuleDict(dict(blueprint.shared)))
        adapter.choices += blueprint.choices
        tokens = (state.tuned_tokens for state in blueprint.shared.values())
        backbone = replace(backbone, tuned_tokens=backbone.tuned_tokens.union(*tokens))
        copies = [(path, clean_copy(modules[path]).requires_grad_(True)) for path in blueprint.modules]
        whole = [(path, TunedModule(c, holds_statistics=blueprint.holds_statistics)) for path, c in copies]
        meant: dict[int, str] = {}
        for path, part in [*blueprint.parts, *whole]:
            module = id(modules[path])
            # A module under two names is one site, and what is meant for it under the second was planned already.
            if meant.setdefault(module, path) == path:
                part.tuner = number
                _add(part, planned.setdefault(names[module], []))
    for state in adapter.shared_states():
        state.trained_tokens = backbone.tuned_tokens
    return planned


def _add(part: Part, parts: list[Part]) -> None:
    """Add a part to those of its site; what is tuned already is not tuned again."""
    if part.own_module is not None and any(other.own_module is not None for other in parts):
        return
    if part.tuned:
        own = set(part.tuned)
        if any(own <= set(other.tuned) for other in parts):
            return
        parts[:] = [other for other in parts if not other.tuned or not set(other.tuned) < own]
    parts.append(part)


def _check_inside(adapter: Adapter, planned: Mapping[str, Sequence[Part]]) -> None:
    """Nothing may be put into a module that the adapter has a copy of: it would act on what the copy replaces."""
    methods = [tuner.method for tuner in adapter.config.tuners]
    owners = dict.fromkeys(adapter.saved, "modules_to_save")
    owners |= {path: methods[p.tuner] for path, parts in planned.items() for p in parts if p.own_module is not None}
    for path, by in owners.items():
        for other, parts in planned.items():
            inside = other.startswith(path + ".") or (other == path and (by == "modules_to_save" or len(parts) > 1))
            if inside:
                raise AdapterError(
                    f"'{other}' is tuned by {methods[parts[0].tuner]} and lies in '{path}', which {by} trains as a "
                    "whole: take one of them out"
                )


def _plan_reads(backbone: Backbone, path: str, parts: Sequence[Part], memory: Callable[[], Memory]) -> str | None:
    """The module that reads the weights which the parts of another change, where that is not called; None if it is."""
    module, anatomy = backbone.modules[path], backbone.anatomy
    kind = type(module).__name__
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise AdapterError(f"'{path}' is a {kind}, which is never called: name what it holds")
    if anatomy is not None and path in anatomy.uncalled:
        raise AdapterError(
            f"'{path}' ({kind}) was neither called nor read in the traced forward: nothing that is put there can have "
            "an effect; leave it out"
        )
    reader = reader_of(backbone.modules, anatomy, path)
    if reader is None:
        return path if any(part.by_weight for part in parts) else None
    others = [name for own in module._parameters for name in memory().others(module, own)]
    if others:
        raise AdapterError(
            f"'{path}' is not called, '{reader}' reads its weights, and they are the same memory as '{others[0]}', on "
            "which what is put there would act too: leave it out"
        )
    for part in parts:
        part.act_by_weight(path)
    return reader


def reader_of(modules: Modules, anatomy: Anatomy | None, path: str) -> str | None:
    """The module that reads the weights of another, which is not called; None if that is called as usual."""
    for read in () if anatomy is None else anatomy.reads:
        if read.module == path:
            return read.reader
    parent = path.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else None


def _typed(adapter: Adapter, backbone: Backbone, *, widen: bool) -> Adapter:
    """The adapter in the type of the backbone, or a wider one, but for its banks, which have types of their own."""
    banks = {id(tensor) for state in adapter.shared_states() if state.bank is not None for tensor in state.buffers()}
    # Of several types the widest, in which every part can work on what the others make.
    held = (p for module in backbone.modules.values() for p in module._parameters.values() if p is not None)
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in held} & TRAINED or {torch.float32})
    dtype = wider(dtype) if widen else dtype
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        if tensor.is_floating_point() and tensor.dtype != dtype and id(tensor) not in banks:
            tensor.data = tensor.data.to(dtype)
    return adapter


def wider(dtype: torch.dtype) -> torch.dtype:
    """The type in which tensors of another are trained: float32 for half precision."""
    return torch.float32 if dtype in HALF else dtype
