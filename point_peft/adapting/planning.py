"""Plan an adapter: built and checked, but not attached; the backbone is not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.heads import HeadSource, PooledHead, make_head, place_head, split_pool
from point_peft.adapting.site import clean_copy, floating_parameter
from point_peft.anatomy.description import Anatomy
from point_peft.config import PeftConfig
from point_peft.errors import AdapterError
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Part
from point_peft.parts.tuned import TunedModule


def build_adapter(
    backbone: Backbone,
    config: PeftConfig,
    heads: Mapping[str, HeadSource] | None,
    saved: Sequence[str] | None = None,
) -> Adapter:
    """An adapter for a backbone, complete but not attached; the backbone is not changed.

    `saved` says by full path which modules the adapter has to itself, and `heads` then names them so too.
    """
    adapter = _assemble(backbone, config, heads, saved)
    _place(adapter, backbone.modules)
    return adapter


def plan_adapter(
    backbone: Backbone, config: PeftConfig, heads: Mapping[str, HeadSource] | None, saved: Sequence[str]
) -> Adapter:
    """The same without memory for what is new in it: to see names, shapes and types of its tensors beforehand."""
    with torch.device("meta"), _NoNumbers():
        adapter = _assemble(backbone, config, heads, saved)
    _take_type(adapter, backbone.modules)
    return adapter


class _NoNumbers(TorchFunctionMode):
    """Leaves out to draw random numbers, for which torch on the meta device first imports for more than a second."""

    drawing = frozenset((Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.drawing:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _assemble(
    backbone: Backbone,
    config: PeftConfig,
    heads: Mapping[str, HeadSource] | None,
    saved: Sequence[str] | None,
) -> Adapter:
    adapter = Adapter(config)
    modules = backbone.modules
    first_names: dict[int, str] = {}
    for path, module in modules.items():
        first_names.setdefault(id(module), path)
    chosen = {id(modules[p]) for p in (_saved_modules(backbone, config, heads) if saved is None else saved)}
    # In the order of the backbone, read from a file or not: an optimizer's state goes by the order of parameters.
    adapter.saved = tuple(path for number, path in first_names.items() if number in chosen)
    sources = match_heads(heads, adapter.saved) if saved is None else dict(heads or {})
    own = {
        path: make_head(sources[path], path, backbone) if path in sources else clean_copy(modules[path])
        for path in adapter.saved
    }
    pooled = [name for head in own.values() if isinstance(head, PooledHead) for name in split_pool(head.pool)]
    backbone = replace(backbone, pooled=frozenset(pooled))
    planned: dict[str, list[Part]] = {}
    for number, tuner in enumerate(config.tuners):
        blueprint = tuner.build(backbone)
        names = [name for state in blueprint.shared.values() for name in state.tuned_tokens]
        backbone = replace(backbone, tuned_tokens=backbone.tuned_tokens.union(names))
        adapter.shared.append(nn.ModuleDict(dict(blueprint.shared)))
        whole = [(path, TunedModule(clean_copy(modules[path]).requires_grad_(True))) for path in blueprint.modules]
        meant: dict[int, str] = {}
        for path, part in [*blueprint.parts, *whole]:
            # A module under two names is one site, and what is meant for it under the second was planned already.
            if meant.setdefault(id(modules[path]), path) != path:
                continue
            part.tuner = number
            _plan(planned.setdefault(first_names[id(modules[path])], []), part)
    _check_inside(adapter, planned)
    for path, head in own.items():
        head.requires_grad_(True)
        for site, part in place_head(head, path, backbone):
            # First in the list, it sees what all others make of the output.
            planned.setdefault(site, []).insert(0, part)
    for path, parts in planned.items():
        reader = _plan_reads(backbone, path, parts)
        if reader is not None:
            adapter.readers.setdefault(reader, []).append(path)
        adapter.parts[path.replace(".", "/")] = nn.ModuleList(parts)
    stem = () if backbone.anatomy is None else backbone.anatomy.stem
    adapter.in_stem = frozenset(path for path in stem if any((site + ".").startswith(path + ".") for site in planned))
    adapter.tensors()
    if next(adapter.parameters(), None) is None:
        raise AdapterError(
            "the adapter would have nothing to train: no head was found or none was asked for; name the modules to "
            "train in modules_to_save"
        )
    return adapter


def _check_inside(adapter: Adapter, planned: Mapping[str, Sequence[Part]]) -> None:
    """Nothing may be put into a module that the adapter has a copy of: it would act on what the copy replaces."""
    methods = [tuner.method for tuner in adapter.config.tuners]
    trained = dict.fromkeys(adapter.saved, "modules_to_save")
    for path, parts in planned.items():
        for part in parts:
            if part.own_module is not None:
                trained[path] = methods[part.tuner]
    for path, by in trained.items():
        for other, parts in planned.items():
            inside = other.startswith(path + ".") or (other == path and (by == "modules_to_save" or len(parts) > 1))
            if inside:
                raise AdapterError(
                    f"'{other}' is tuned by {methods[parts[0].tuner]} and lies in '{path}', which {by} trains as a "
                    "whole: take one of them out"
                )


def _plan(parts: list[Part], part: Part) -> None:
    """Add a part to those of its site; what is tuned already is not tuned again."""
    if part.own_module is not None and any(other.own_module is not None for other in parts):
        return
    if part.tuned:
        own = set(part.tuned)
        if any(own <= set(other.tuned) for other in parts):
            return
        parts[:] = [other for other in parts if not other.tuned or not set(other.tuned) < own]
    parts.append(part)


def _plan_reads(backbone: Backbone, path: str, parts: Sequence[Part]) -> str | None:
    """Who reads the weights that the parts of a module change, where it is not called; None if it is."""
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
    for part in parts:
        part.act_by_weight(path)
    return reader


def reader_of(modules: Mapping[str, nn.Module], anatomy: Anatomy | None, path: str) -> str | None:
    """The module that reads the weights of another, which is not called; None if that is called as usual."""
    for read in () if anatomy is None else anatomy.reads:
        if read.module == path:
            return read.reader
    parent = path.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else None


def _place(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Move an adapter to the device of the backbone, and all but its banks to the backbone's floating type."""
    like = floating_parameter(modules)
    if like is not None:
        adapter.to(like.device)
        _take_type(adapter, modules)


def _take_type(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    like = floating_parameter(modules)
    if like is None:
        return
    banks = {id(tensor) for state in adapter.shared_states() if state.bank is not None for tensor in state.buffers()}
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        if tensor.is_floating_point() and tensor.dtype != like.dtype and id(tensor) not in banks:
            tensor.data = tensor.data.to(like.dtype)


def _saved_modules(backbone: Backbone, config: PeftConfig, heads: Mapping[str, HeadSource] | None) -> tuple[str, ...]:
    """Paths of the modules that the adapter gets to itself, outer ones only."""
    names, stated = list(backbone.modules), config.saved_modules
    if stated is None:
        found = () if backbone.anatomy is None else backbone.anatomy.heads
    else:
        found = match_names(stated, names, field="modules_to_save")
    extra = match_names(list(heads or ()), names, field="heads")
    chosen = dict.fromkeys([*found, *extra])
    return tuple(p for p in chosen if not any(p.startswith(other + ".") for other in chosen))


def match_heads(heads: Mapping[str, HeadSource] | None, saved: Sequence[str]) -> dict[str, HeadSource]:
    """The `heads` argument by full module path."""
    own: dict[str, HeadSource] = {}
    for name, source in (heads or {}).items():
        for path in [name] if name in saved else match_names([name], saved, field="heads"):
            if path in own:
                raise AdapterError(f"heads names '{path}' twice")
            own[path] = source
    return own
