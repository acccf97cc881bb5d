"""Plan, freeze, attach and detach: the only file that touches the modules of a backbone.

An adapted module keeps its class, its children and its tensors. It gets hooks, which are functions of this file without
state, and in its `__dict__` a `Site` that says who it is. Everything else is found through the current `Forward`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from point_peft import context, reading
from point_peft import tokens as token_ops
from point_peft.anatomy import Anatomy, Stage, Steps, Tap
from point_peft.config import PeftConfig
from point_peft.context import Forward, Root, StemCall
from point_peft.errors import AdapterError, AnatomyError
from point_peft.heads import HeadSource, OwnModule, PooledHead, make_head, place_head, split_pool
from point_peft.matching import match_names
from point_peft.tokens import Args, Kwargs
from point_peft.tuners.base import Backbone, Bank, Call, Part, SharedState, TunedCopy, TunedModule
from point_peft.tuners.prefix import TunedTokens

SITE = "_point_peft_site"
CHILD = "point_peft"
"""The name under which a model that keeps its own class holds its adapters."""
PLAIN = (nn.Linear, nn.LayerNorm)
"""Classes whose forward only gives their tensors to a function of torch, which can be given others."""


@dataclass(frozen=True)
class Site:
    """What an adapted module knows of itself: its path in the backbone and who holds the adapters."""

    path: str
    root: Root


class Adapter(nn.Module):
    """Everything that belongs to one task: parts by site, state that they share, heads of its own."""

    def __init__(self, config: PeftConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = nn.ModuleDict()
        """Site path with "/" for "." -> its parts."""
        self.shared = nn.ModuleList()
        """One ModuleDict of shared state for each of the configuration's tuners."""
        self.saved: tuple[str, ...] = ()
        """Paths of the modules that the adapter has to itself."""
        self.in_stem: frozenset[str] = frozenset()
        """Modules of the stem in which it has parts, so that what they compute is not what the backbone would."""
        self.readers: dict[str, list[str]] = {}
        """Modules that read weights of modules which are not called -> these, as far as the adapter changes them."""

    def sites(self) -> Iterator[tuple[str, nn.ModuleList]]:
        """(module path, parts)"""
        for key, parts in self.parts.items():
            assert isinstance(parts, nn.ModuleList)
            yield key.replace("/", "."), parts

    def called(self) -> Iterator[str]:
        """The sites with parts that act when their module is called."""
        for path, part in self.all_parts():
            if not part.by_weight:
                yield path

    def all_parts(self) -> Iterator[tuple[str, Part]]:
        """(module path, part)"""
        for path, parts in self.sites():
            for part in parts:
                assert isinstance(part, Part)
                yield path, part

    def shared_states(self) -> Iterator[SharedState]:
        """The state that parts share, of all tuners."""
        for group in self.shared:
            for state in group.children():
                assert isinstance(state, SharedState)
                yield state

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(module path, module) of the modules that the adapter has to itself."""
        for path, part in self.all_parts():
            if isinstance(part, OwnModule):
                yield path, part.module

    @property
    def asks_backbone(self) -> bool:
        """Whether it asks for the tokens of the last block, which take a second pass."""
        return any(isinstance(state, Bank) and state.source == "backbone" for state in self.shared_states())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter, trained or not, by `<module path>.<name>`."""
        found: dict[str, Tensor] = {}
        owners: list[tuple[str, Part | SharedState]] = [*self.all_parts(), *(("", s) for s in self.shared_states())]
        for path, module in owners:
            for name, tensor in module.state_dict(keep_vars=True).items():
                key = ".".join(filter(None, [path, module.file_name(name)]))
                if key in found:
                    raise AdapterError(f"two parts of one adapter have a tensor '{key}'")
                found[key] = tensor
        return found

    def holds_only(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether it holds no tensors but these."""
        known = {id(tensor) for tensor in tensors.values()}
        return all(id(tensor) in known for tensor in (*self.parameters(), *self.buffers()))

    def free_rows(self) -> frozenset[str]:
        """Names, as in `tensors`, of those whose number of rows the configuration does not tell."""
        return frozenset(state.file_name(name) for state in self.shared_states() for name in state.free_rows)


# ---- planning --------------------------------------------------------------------------------------------------------


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
        names = [name for state in blueprint.shared.values() if isinstance(state, TunedTokens) for name in state.tuned]
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
            if isinstance(part, TunedModule):
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
    if isinstance(part, TunedModule) and any(isinstance(other, TunedModule) for other in parts):
        return
    if isinstance(part, TunedCopy):
        own = set(part.state_dict())
        copies = [other for other in parts if isinstance(other, TunedCopy)]
        if any(own <= set(other.state_dict()) for other in copies):
            return
        parts[:] = [other for other in parts if other not in copies or not set(other.state_dict()) < own]
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
    banks = {id(tensor) for state in adapter.shared_states() if isinstance(state, Bank) for tensor in state.buffers()}
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        if tensor.is_floating_point() and tensor.dtype != like.dtype and id(tensor) not in banks:
            tensor.data = tensor.data.to(like.dtype)


def floating_parameter(modules: Mapping[str, nn.Module]) -> Tensor | None:
    """A parameter of a backbone whose type and device its adapters take; None if it has none."""
    return next((p for p in modules[""].parameters() if p.is_floating_point()), None)


def backbone_modules(root: Root) -> dict[str, nn.Module]:
    """Every module of the backbone by path, under each of its names, without the adapters that it may hold."""
    found = {"": root.base_model}
    for name, child in root.base_model._modules.items():
        if child is not None and name != CHILD:
            found |= child.named_modules(prefix=name, remove_duplicate=False)
    return found


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


def clean_copy(module: nn.Module) -> nn.Module:
    """A copy of a module of the backbone without the hooks of this library."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        site = child.__dict__.get(SITE)
        if site is not None:
            memo[id(site)] = site
    copied = copy.deepcopy(module, memo)
    for child in copied.modules():
        _strip(child)
    return copied


# ---- attaching -------------------------------------------------------------------------------------------------------


def attach_model(root: Root) -> None:
    """Hook what every adapter needs: the model, where coordinates are seen, the stem, the blocks, frozen norms."""
    base = root.base_model
    _site(root, "")
    base.register_load_state_dict_post_hook(_allow_base_alone)  # type: ignore[no-untyped-call]
    base.register_forward_pre_hook(_enter_model, with_kwargs=True)
    base.register_forward_hook(_leave_model, with_kwargs=True, always_call=True)
    for module in frozen_norms(root).values():
        module.register_forward_pre_hook(_hold_eval)
    anatomy = root.anatomy
    if anatomy is None:
        return
    for path in anatomy.stem:
        module = _site(root, path)
        module.register_forward_pre_hook(_reuse_stem, with_kwargs=True)
        module.register_forward_hook(_keep_stem, with_kwargs=True)
    for path in dict.fromkeys(tap.module for stage in anatomy.stages for tap in stage.taps):
        module = _site(root, path)
        module.register_forward_pre_hook(_tap_input, with_kwargs=True)
        module.register_forward_hook(_tap_output)
    for block in anatomy.blocks:
        _site(root, block.path).register_forward_pre_hook(_check_tokens, with_kwargs=True)
    _site(root, anatomy.stages[anatomy.queried].blocks[-1].path).register_forward_hook(_end_second_pass)


def attach_sites(root: Root, adapter: Adapter) -> None:
    """Hook what an adapter needs hooks at, unless it is hooked already."""
    for path in adapter.called():
        module = _site(root, path)
        if _before_parts not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before_parts, with_kwargs=True)
            # After an exception too, what a plain module was given in the place of its tensors is taken away.
            module.register_forward_hook(_after_parts, with_kwargs=True, always_call=type(module) in PLAIN)
    for path in adapter.readers:
        module = _site(root, path)
        if _begin_reading not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_begin_reading)
            module.register_forward_hook(_end_reading, always_call=True)


def detach_sites(root: Root, gone: Adapter, others: Sequence[Adapter]) -> None:
    """Unhook what only an adapter that is gone needed hooks at."""
    called = {path for other in others for path in other.called()}
    read = {path for other in others for path in other.readers}
    for path in {*gone.called(), *gone.readers}:
        module = root.base_model.get_submodule(path)
        _remove_hooks(module, () if path in called else (_before_parts, _after_parts))
        _remove_hooks(module, () if path in read else (_begin_reading, _end_reading))
        left = {*module._forward_pre_hooks.values(), *module._forward_hooks.values()} - {_hold_eval}
        if left.isdisjoint(_HOOKS):
            module.__dict__.pop(SITE, None)


def detach_model(root: Root) -> None:
    """Take every hook and reference off the backbone."""
    for module in backbone_modules(root).values():
        _strip(module)
    hooks = root.base_model._load_state_dict_post_hooks
    for number in [number for number, hook in hooks.items() if hook is _allow_base_alone]:
        del hooks[number]


def frozen_norms(root: Root) -> dict[str, nn.Module]:
    """Modules of the backbone that keep running statistics, which training must not move."""
    return {path: module for path, module in backbone_modules(root).items() if isinstance(module, _NormBase)}


def _site(root: Root, path: str) -> nn.Module:
    module = root.base_model.get_submodule(path)
    if SITE not in module.__dict__:
        module.__dict__[SITE] = Site(path, root)
    return module


def _strip(module: nn.Module) -> None:
    module.__dict__.pop(SITE, None)
    _remove_hooks(module, _HOOKS)


def _remove_hooks(module: nn.Module, hooks: Sequence[Any]) -> None:
    """By function and not by handle: a handle knows one model, and models are copied."""
    for registered, flags in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for number in [number for number, hook in registered.items() if hook in hooks]:
            del registered[number]
            for flag in flags:
                flag.pop(number, None)


def _allow_base_alone(module: nn.Module, incompatible: Any) -> None:
    """A checkpoint of the backbone alone loads into a model that also holds adapters."""
    if CHILD not in module._modules:
        return
    own = [key for key, _ in module.named_parameters() if key.startswith(CHILD + ".")]
    missing = incompatible.missing_keys
    if set(own) <= set(missing):
        missing[:] = [key for key in missing if not key.startswith(CHILD + ".")]


# ---- hooks -----------------------------------------------------------------------------------------------------------


def _enter_model(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    site: Site = module.__dict__[SITE]
    root = site.root
    if module.__dict__.get("_is_replica", False) and CHILD in module._modules:
        root = module._modules[CHILD]  # type: ignore[assignment]  # the replica's own adapters
        root.__dict__["base_model"] = module  # and not the model that was replicated
    forward = context.open_forward(root, args, kwargs)
    gone = [name for name in forward.active if name not in _adapters(root)]
    if gone:
        raise AdapterError(f"adapter '{gone[0]}' is active in this thread or task, but was deleted: call set_adapter")
    if torch.compiler.is_compiling() or any(name in root.unproven for name in forward.active):
        forward.ran = set()


def _leave_model(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    context.close_forward(forward)
    if output is None:  # an exception is on its way
        return
    if forward.ran is not None:
        _prove(forward)
    if torch.is_grad_enabled():
        context.mark(forward, output)


def _prove(forward: Forward) -> None:
    """After the first forward of an adapter, and whenever a forward is traced: every part must have run."""
    traced = torch.compiler.is_compiling()
    for name in forward.active:
        if forward.ran is None or not (traced or name in forward.root.unproven):
            continue
        adapter = get_adapter(forward.root, name)
        silent = [(path, parts) for path, parts in adapter.sites() if (name, path) not in forward.ran]
        if silent:
            path, parts = silent[0]
            kind = type(forward.root.base_model.get_submodule(path)).__name__
            more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
            raise AdapterError(
                f"adapter '{name}': the {type(parts[0]).__name__} at '{path}'{more} had no effect, because that module "
                f"({kind}) was not called in the forward; its weights may be read by another module. Leave it out with "
                "exclude_modules or modules_to_save, or adapt the module that is called"
            )
        if not traced:
            forward.root.unproven.discard(name)


def _before_parts(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    if forward.owner is not None:
        for part, call in _calls(forward, (forward.owner,), site.path, module):
            if part.in_second_pass:
                args, kwargs = part.before_second(call, args, kwargs)
        return args, kwargs
    if not forward.active:
        return None
    calls = _calls(forward, forward.active, site.path, module)
    if calls and _is_plain(module) and all(isinstance(part, TunedCopy) and not part.by_weight for part, _ in calls):
        # With its own tensors in place of the base's, the module needs no difference to be added to what it gives.
        adapted = _adapted(module, calls)
        _read(module, forward, site.root, {id(base): (site.path, value) for base, value in adapted.values()})
        return None
    for part, call in calls:
        if not part.by_weight:
            args, kwargs = part.before(call, args, kwargs)
    return args, kwargs


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is known to do no more than to give its tensors to a function, which can be given others."""
    own = "forward" not in module.__dict__  # as accelerate sets it, which moves the tensors
    return own and type(module) in PLAIN and not torch.compiler.is_compiling()


def _after_parts(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    site: Site = module.__dict__[SITE]
    read = None if torch.compiler.is_compiling() else reading.leave(module)
    if output is None and type(module) in PLAIN:  # an exception is on its way
        return None
    forward = context.current_forward(site.root)
    if not forward.active:
        return None
    for part, call in reversed(_calls(forward, forward.active, site.path, module)):
        if part.by_weight:
            continue
        if read is None:
            output = part.after(call, args, kwargs, output)
        if forward.ran is not None and (read is None or site.path in read):
            forward.ran.add((call.adapter, site.path))
    if forward.inputs is None and not forward.recomputing and torch.is_grad_enabled() and not forward.leaves:
        # A direct call, which no end of a model's forward will mark. Not where blocks hand on tensors: the forward
        # holds those, and the mark would hold the forward in a circle that no garbage collector sees.
        context.mark(forward, output)
    return output


def _begin_reading(module: nn.Module, args: Args) -> None:
    """While this module runs, it reads the adapted weights of others."""
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    adapted = _read_weights(forward, site)
    if adapted:
        _read(module, forward, site.root, adapted)


def _read(module: nn.Module, forward: Forward, root: Root, adapted: Mapping[int, tuple[str, Tensor]]) -> None:
    """While the module runs, it reads the adapted tensors. What Ctrl-C leaves behind dies with its forward."""
    reading.enter(module, adapted, lambda: context.current_forward(root) is forward)


def _end_reading(module: nn.Module, args: Args, output: Any) -> None:
    site: Site = module.__dict__[SITE]
    used = reading.leave(module) or ()
    forward = context.current_forward(site.root)
    if forward.ran is None or output is None:
        return
    for name in forward.active:
        read = get_adapter(forward.root, name).readers.get(site.path, ())
        forward.ran.update((name, path) for path in read if path in used)


def _read_weights(forward: Forward, site: Site) -> dict[int, tuple[str, Tensor]]:
    """What the module of a site reads of others: by the identity of the base's tensor, the module and the adapted."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path in dict.fromkeys(
        p for n in forward.active for p in get_adapter(forward.root, n).readers.get(site.path, ())
    ):
        module = forward.root.base_model.get_submodule(path)
        calls = [(part, call) for part, call in _calls(forward, forward.active, path, module) if part.by_weight]
        found |= {id(base): (path, value) for base, value in _adapted(module, calls).values()}
    return found


def _adapted(module: nn.Module, calls: Sequence[tuple[Part, Call]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A module's tensors by name, those of the base and with parts folded in, for those that they change."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for part, _ in calls:
        for name, value in part.weights(module).items():
            base = getattr(module, name)
            before, value = found.get(name, (base, base))[1], value.to(base.dtype)
            found[name] = base, value if before is base else before + (value - base)
    return found


def _calls(forward: Forward, names: Sequence[str], path: str, module: nn.Module) -> list[tuple[Part, Call]]:
    """The parts of some adapters at a site, in order, each with what it is told."""
    key = path.replace(".", "/")
    found: list[tuple[Part, Call]] = []
    for name in names:
        adapter: Any = _adapters(forward.root)[name]
        for part in adapter.parts._modules.get(key, ()):
            # Not by index, which a ModuleList takes long to look up: this runs at every call of an adapted module.
            shared = adapter.shared._modules[str(part.tuner)]
            found.append((part, Call(path=path, module=module, forward=forward, adapter=name, shared=shared)))
    return found


def _check_tokens(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Every block must see the token layout that its parts were built for."""
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    if forward.parent is not None and forward.parent.stop_at == "stem":
        context.end_second_pass(forward.parent, forward.patches.get(0))
    parts = [part for part, _ in _calls(forward, forward.active, site.path, module)]
    if not parts:
        return
    index, stage = _stage(_known(site.root), site.path)
    tokens = token_ops.block_tokens(stage, site.path, args, kwargs)
    if not any(part.needs_coordinates for part in parts):
        return
    forward.begun.add(index)
    if index in forward.misplaced:
        raise AnatomyError(forward.misplaced[index])
    if index not in forward.coordinates:
        raise AnatomyError(
            f"block '{site.path}' runs before the coordinates of its tokens were seen at the {stage.coordinates}: call "
            "the model, or a method that runs its grouping too"
        )
    shape = tuple(forward.coordinates[index].shape)
    if stage.layout == "packed":
        if shape[0] != len(tokens) or index not in forward.samples:
            raise AnatomyError(
                f"block '{site.path}' should get one token for each of the coordinates {shape} and be told which "
                f"sample each belongs to at the {stage.samples}; it got tokens {tuple(tokens.shape)}"
            )
        return
    length = tokens.shape[token_ops.token_dim(stage.layout)]
    batch = tokens.shape[1 - token_ops.token_dim(stage.layout)]
    prefix = length - shape[1]
    if batch != shape[0] or prefix < 0 or (stage.prefix_tokens is not None and prefix != stage.prefix_tokens):
        expected = "some" if stage.prefix_tokens is None else stage.prefix_tokens
        raise AnatomyError(
            f"block '{site.path}' should get {expected} prefix tokens and one token for each of the coordinates "
            f"{shape}; it got tokens {tuple(tokens.shape)}"
        )


def _known(root: Root) -> Anatomy:
    assert root.anatomy is not None  # the hooks that ask are attached by what it says
    return root.anatomy


def _stage(anatomy: Anatomy, path: str) -> tuple[int, Stage]:
    return next((i, stage) for i, stage in enumerate(anatomy.stages) if any(b.path == path for b in stage.blocks))


def _tap_input(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    _tap(module.__dict__[SITE], "input", lambda steps: token_ops.fetch_argument(args, kwargs, steps))


def _tap_output(module: nn.Module, args: Args, output: Any) -> None:
    _tap(module.__dict__[SITE], "output", lambda steps: token_ops.fetch(output, steps))


def _tap(site: Site, side: str, fetch: Callable[[Steps], Any]) -> None:
    def is_here(tap: Tap) -> bool:
        return tap.module == site.path and tap.side == side

    def find(tap: Tap) -> Any:
        found = fetch(tap.steps)
        return fetch(tap.else_steps) if found is None and tap.else_steps else found

    if context.current_forward(site.root).apart:
        return
    for index, stage in enumerate(_known(site.root).stages):
        if stage.coordinates is not None and is_here(stage.coordinates):
            context.restart_direct(site.root, "coordinates", index)
            forward = context.current_forward(site.root)
            _see_coordinates(forward, index, find(stage.coordinates), stage.coordinates, stage)
        for what, tap in (("samples", stage.samples), ("points", stage.points), ("patches", stage.patch_tokens)):
            value = find(tap) if tap is not None and is_here(tap) else None
            if isinstance(value, Tensor):
                context.restart_direct(site.root, what, index)
                forward = context.current_forward(site.root)
                seen = {"samples": forward.samples, "points": forward.points, "patches": forward.patches}[what]
                seen.setdefault(index, value)


def _see_coordinates(forward: Forward, index: int, value: Any, tap: Tap, stage: Stage) -> None:
    """Keep the coordinates of a stage; what is wrong with them is an error for those alone that need them."""
    dims, shape = (2, "(n, 3)") if stage.layout == "packed" else (3, "(b, g, 3)")
    if not isinstance(value, Tensor) or value.ndim != dims or value.shape[-1] != 3:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        forward.misplaced[index] = f"the {tap} should be the coordinates {shape} of the tokens; it is {got}"
        return
    # Whole numbers are cells of a grid.
    value = value if value.is_floating_point() else value.float()
    known = forward.coordinates.setdefault(index, value)
    again = index in forward.begun and not forward.recomputing
    if again and known is not value and (known.shape != value.shape or not torch.equal(known, value)):
        forward.misplaced[index] = (
            f"the blocks of '{stage.blocks[0].path}' run on a second set of points in one forward (at the {tap}), and "
            "what they share would be the first set's: call the model once for each, or use LORA or BITFIT"
        )


def _hold_eval(module: nn.Module, args: Args) -> None:
    """The statistics of a frozen backbone do not move, whoever has called train() on it."""
    module.training = False


# ---- the second pass -------------------------------------------------------------------------------------------------


def backbone_tokens(root: Root, forward: Forward, source: str, adapter: str) -> Tensor:
    """Patch tokens (b, g, c) of the frozen backbone without adapters, once per forward.

    `source` is "stem" for the patch embedding, "backbone" for the tokens of the last block after the final norm; those
    take a second pass, which reuses what the stem has computed from the same inputs and ends at the last block. An
    adapter that was made for other random values of prefix tokens gets a second pass with those.
    """
    if source == "stem" and 0 in forward.patches and not _changes_stem(forward):
        return forward.patches[0].detach()
    tokens = [state for state in get_adapter(forward.root, adapter).shared_states() if isinstance(state, TunedTokens)]
    owner = adapter if any(state.other_base(forward.root.base_model) for state in tokens) else None
    key = "tokens", source, owner
    if forward.inputs is None and key not in forward.cache:
        hint = ', or use prior="stem"' if source == "backbone" else ", or run its patch embedding first"
        raise AdapterError(
            f"the prior from the {source} needs a call of the model itself, which it runs a second time; this is a "
            f"direct call of a part of it: call the model{hint}"
        )

    def take() -> Tensor:
        batch = forward.whole
        if batch is None:
            return _second_pass(root, forward, source, owner)
        found = batch.once(key, lambda: _second_pass(root, batch, source, owner))
        return found if forward.rows is None else found[forward.rows]

    return forward.once(key, take)


def _second_pass(root: Root, forward: Forward, source: str, owner: str | None) -> Tensor:
    tokens = _pass(root, forward, source, owner)
    if tokens is None:
        raise AdapterError(f"the second pass for the prior never came to what tells the tokens of the {source}")
    return tokens


def _pass(root: Root, forward: Forward, source: str, owner: str | None) -> Tensor | None:
    """Run the model without adapters as far as the stem or the last block; the tokens there, if they are known."""
    assert forward.inputs is not None
    args, kwargs = forward.inputs
    with _second(root, forward, source, owner), _answering(root), torch.no_grad():
        try:
            if forward.method is None:
                root.base_model(*args, **kwargs)
            else:
                context.open_forward(root, args, kwargs)
                getattr(root.base_model, forward.method)(*args, **kwargs)
        except context.Stop as stop:
            forward.reached = stop.args[0]
    reached, forward.reached = forward.reached, None
    return reached


@contextmanager
def _second(root: Root, forward: Forward, source: str, owner: str | None) -> Iterator[None]:
    """In here, the model runs without adapters and, but for the stem, in eval mode."""
    stem = {m for path in _known(root).stem for m in root.base_model.get_submodule(path).modules()}
    others = [module for module in backbone_modules(root).values() if module not in stem]
    before = context.opened(root)
    forward.stop_at, forward.stop_owner = source, owner
    context.reopen(forward.root, forward)
    try:
        with context.eval_mode(others), _own_random_numbers(root):
            yield
    finally:
        forward.stop_at, forward.stop_owner = None, None
        context.reopen(forward.root, before)


def _own_random_numbers(root: Root) -> AbstractContextManager[None]:
    """In here, drawing random numbers leaves the generators as they were.

    Gradient checkpointing may run a block again, but not the second pass that ran within it.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    devices = {parameter.device for parameter in root.base_model.parameters() if parameter.is_cuda}
    return torch.random.fork_rng(sorted(devices, key=str))


def _end_second_pass(module: nn.Module, args: Args, output: Any) -> None:
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    if forward.parent is None or forward.parent.stop_at != "backbone":
        return
    anatomy = _known(site.root)
    forward.ended += 1
    if forward.ended < anatomy.last_block_calls:
        return
    stage = anatomy.stages[anatomy.queried]
    tokens = token_ops.batch_first(token_ops.output_tokens(stage, site.path, output), stage.layout)
    if stage is anatomy.stages[-1]:
        for path in anatomy.final_norms:
            tokens = forward.root.base_model.get_submodule(path)(tokens)
    if anatomy.queried not in forward.coordinates:
        raise AnatomyError(
            forward.misplaced.get(anatomy.queried)
            or f"the coordinates of the tokens of '{site.path}' were not seen at the {stage.coordinates}"
        )
    g = forward.coordinates[anatomy.queried].shape[1]
    context.end_second_pass(forward.parent, tokens[:, tokens.shape[1] - g :])


def _keep_stem(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Remember what a module of the stem computed, for forwards that ask it the same; give what was remembered."""
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    if torch.compiler.is_compiling() and site.path in forward.stem and forward.parent is not None:
        return forward.stem[site.path].output
    second = forward.parent is not None and forward.parent.stop_at is not None
    wanted = second or forward.active or forward.whole is not None
    if wanted and not kwargs and not forward.apart and not _changes_stem(forward, site.path):
        call = forward.known_stem.get(site.path)
        if call is None or call.output is not output:
            call = StemCall.of(args, output)
        if second and forward.parent is not None:
            forward.parent.stem.setdefault(site.path, call)
        forward.stem[site.path] = call
    return None


def _changes_stem(forward: Forward, path: str | None = None) -> bool:
    """Whether an active adapter has a part in a module of the stem, or in any."""
    changed = [get_adapter(forward.root, name).in_stem for name in forward.active]
    return any(paths if path is None else path in paths for paths in changed)


def _reuse_stem(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """In compiled code, a module of the stem runs in the second pass on one sample only; `_keep_stem` does the rest.

    A hook cannot keep a module from running, but it can give it next to nothing to do.
    """
    if not torch.compiler.is_compiling():
        return None
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    call = forward.known_stem.get(site.path)
    if call is None or kwargs or not args or not call.answers(args):
        return None
    if any(value.shape[0] != args[0].shape[0] for value in args):
        return None
    forward.stem[site.path] = call
    return tuple(value[:1] for value in args), kwargs


@contextmanager
def _answering(root: Root) -> Iterator[None]:
    """In here, a module of the stem need not compute what the forward that it runs in knows.

    No hook can keep a module from running. So its `forward` is set for a while, to what runs the module's own unless
    the answer is known; that is right in every other forward and thread as well.
    """
    modules = [] if root.anatomy is None else [root.base_model.get_submodule(path) for path in root.anatomy.stem]
    # Not where compiled code cannot follow, nor where another thread has done it already.
    own = {} if torch.compiler.is_compiling() else {module: module.__dict__.get("forward") for module in modules}
    own = {module: set_by_user for module, set_by_user in own.items() if not _answers(set_by_user)}
    for module, set_by_user in own.items():
        module.__dict__["forward"] = partial(_answer, module, set_by_user)
    try:
        yield
    finally:
        for module, set_by_user in own.items():
            if set_by_user is not None:  # as accelerate's are, which moves weights between devices
                module.__dict__["forward"] = set_by_user
            else:
                module.__dict__.pop("forward", None)


def _answers(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func is _answer


def _answer(module: nn.Module, set_by_user: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """What a module of the stem gives: what is known, else what it computes."""
    site: Site = module.__dict__[SITE]
    forward = context.current_forward(site.root)
    call = forward.known_stem.get(site.path)
    if call is not None and not kwargs and not _changes_stem(forward, site.path) and call.answers(args):
        return call.output
    return type(module).forward(module, *args, **kwargs) if set_by_user is None else set_by_user(*args, **kwargs)


# ---- a batch for several forwards ------------------------------------------------------------------------------------


@contextmanager
def sharing(root: Root, args: Args, kwargs: Kwargs, count: int) -> Iterator[Forward]:
    """In here, forwards run parts of one batch, or run it for several tasks, and share the backbone's frozen work.

    `rows` of what this gives says which of its `count` samples the next forward runs.
    """
    before = context.opened(root)
    batch = context.open_forward(root, args, kwargs)
    batch.active, batch.shares, batch.samples_in_all = (), True, count
    batch.stem = dict(batch.known_stem)
    try:
        with _answering(root):
            yield batch
    finally:
        context.close_forward(batch)
        context.reopen(root, before)


def run_stem(root: Root, batch: Forward) -> None:
    """Compute the stem for a whole batch, of which forwards will then run parts."""
    if root.anatomy is not None and root.anatomy.stem:
        _pass(root, batch, "stem", None)


_HOOKS = (
    _enter_model,
    _leave_model,
    _hold_eval,
    _reuse_stem,
    _keep_stem,
    _tap_input,
    _tap_output,
    _check_tokens,
    _end_second_pass,
    _before_parts,
    _after_parts,
    _begin_reading,
    _end_reading,
)


def get_adapter(root: Root, name: str) -> Adapter:
    """The adapter of that name, which exists."""
    adapter = _adapters(root)[name]
    assert isinstance(adapter, Adapter)
    return adapter


def _adapters(root: Root) -> Mapping[str, nn.Module | None]:
    """Adapters by name; while `torch.compile` or `torch.export` traces, the active ones by their place."""
    return root.slots if torch.compiler.is_compiling() else root.adapters._modules
