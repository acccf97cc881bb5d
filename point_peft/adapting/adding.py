"""Adapters added to a model by name, the backbone frozen under them, and taken off again."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.attaching import attach_model, attach_sites, detach_model, detach_sites, frozen_norms, reattach
from point_peft.adapting.proving import to_prove
from point_peft.adapting.site import CHILD, backbone_modules
from point_peft.adapting.weights import folded, overwrite_weights, place_own_modules
from point_peft.anatomy.checking import check_anatomy
from point_peft.anatomy.description import Anatomy
from point_peft.config import PeftConfig
from point_peft.errors import AdapterError
from point_peft.parts.backbone import Backbone
from point_peft.running.activation import choose_adapters, chosen_adapters
from point_peft.running.forward import Root, forget

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,99}")


@dataclass(kw_only=True)
class Frozen:
    """A backbone's states from before it was frozen, to be restored."""

    requires_grad: dict[str, bool]
    """By the name of a parameter."""
    norm_modes: dict[str, bool]
    """By the path of a module with running statistics: whether it would be in train mode."""


class Host(Root, Protocol):
    """The module that holds adapters, as adding and removing changes it."""

    why_unknown: str
    """Why there is no anatomy."""
    frozen: Frozen | None
    """The backbone's states from before the first adapter; None while nothing is attached."""
    training: bool


def check_new_name(adapters: nn.ModuleDict, name: str) -> None:
    """Refuse what cannot be the name of a further adapter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r} is not valid: at most 100 letters, digits, '_' and '-', the first not '-'"
        )
    if name in adapters._modules:
        raise AdapterError(f"there is an adapter '{name}' already: delete it first or choose another name")


def all_adapters(adapters: nn.ModuleDict) -> dict[str, Adapter]:
    """Every adapter by name, in the order in which they were added."""
    return {name: adapter for name, adapter in adapters._modules.items() if isinstance(adapter, Adapter)}


def named_adapter(adapters: nn.ModuleDict, name: str) -> Adapter:
    """The adapter of that name; if there is none, the error says which there are."""
    adapter = adapters._modules.get(name) if isinstance(name, str) else None
    if not isinstance(adapter, Adapter):
        known = ", ".join(f"'{other}'" for other in adapters) or "none"
        raise AdapterError(f"there is no adapter {name!r}; adapters: {known}")
    return adapter


def meant_adapters(adapters: nn.ModuleDict, names: str | Sequence[str] | None) -> dict[str, Adapter]:
    """The adapters that a name or a list of names means, each of which exists; None means all."""
    if names is None:
        return all_adapters(adapters)
    chosen = (names,) if isinstance(names, str) else tuple(names)
    meant = {name: named_adapter(adapters, name) for name in chosen}
    if len(meant) != len(chosen):
        raise AdapterError(f"an adapter is named twice in {list(chosen)}")
    return meant


def adapters_to_save(
    adapters: nn.ModuleDict, merged: Collection[str], names: str | Sequence[str] | None
) -> dict[str, Adapter]:
    """The adapters that a name or a list of names means, to be saved, which is refused where it cannot be done."""
    chosen = meant_adapters(adapters, names)
    if not adapters:
        raise AdapterError("there is no adapter to save")
    check_unmerged(merged, "adapters cannot be saved")
    if not chosen:
        raise AdapterError("save_pretrained got an empty list of adapters: name at least one")
    return chosen


def single_adapter(adapters: nn.ModuleDict, active: Sequence[str], name: str | None) -> tuple[str, Adapter]:
    """The name of the one adapter that is meant, and it; None means the active one."""
    if name is None:
        if len(active) != 1:
            raise AdapterError(f"name one adapter: active are {list(active)}, present {list(adapters)}")
        name = active[0]
    return name, named_adapter(adapters, name)


def task_names(adapters: nn.ModuleDict, names: Sequence[str | None] | str) -> tuple[str | None, ...]:
    """The adapters, each of which exists, that take turns; None is the plain backbone."""
    if isinstance(names, str) or not names:
        raise AdapterError(
            f"name adapters in a list, None for the plain backbone; got {names!r} (a model called with "
            "adapter_names='auto' chooses for itself)"
        )
    for name in names:
        if name is not None:
            named_adapter(adapters, name)
    return tuple(names)


def check_unmerged(merged: Collection[str], what: str) -> None:
    """Refuse to do what cannot be done while an adapter is merged; `what` begins the sentence."""
    if merged:
        raise AdapterError(f"{what} while '{next(iter(merged))}' is merged into the backbone: call unmerge() first")


def freeze(root: Root) -> Frozen:
    """Let no parameter of a backbone be trained and no running statistic move."""
    parameters, norms = own_parameters(root.base_model), frozen_norms(root)
    frozen = Frozen(
        requires_grad={name: parameter.requires_grad for name, parameter in parameters.items()},
        norm_modes={path: module.training for path, module in norms.items()},
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for module in norms.values():
        module.training = False
    return frozen


def hold_norms(root: Root, frozen: Frozen, mode: bool) -> None:
    """After train() or eval(): running statistics still do not move, and what is restored is what was asked for."""
    for path, module in frozen_norms(root).items():
        frozen.norm_modes[path] = mode
        module.training = False


def restore(base: nn.Module, frozen: Frozen) -> None:
    for name, parameter in base.named_parameters():
        if name in frozen.requires_grad:
            parameter.requires_grad_(frozen.requires_grad[name])
    for path, mode in frozen.norm_modes.items():
        base.get_submodule(path).training = mode


def own_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a backbone by name, without those of the adapters that it may hold."""
    return {name: p for name, p in base.named_parameters() if not name.startswith(CHILD + ".")}


def backbone_for(root: Host, config: PeftConfig | None = None) -> Backbone:
    """The backbone as a further adapter of this configuration sees it; without one, as those of the model do."""
    known = root.anatomy if config is None else _anatomy_for(root, config)
    return Backbone(model=root.base_model, modules=backbone_modules(root), anatomy=known, why_unknown=root.why_unknown)


def _anatomy_for(root: Host, config: PeftConfig) -> Anatomy | None:
    """The anatomy that a further adapter goes by: what its configuration states, or what is known."""
    stated = config.stated_anatomy
    if stated is None:
        return root.anatomy
    check_anatomy(root.base_model, stated)
    if not root.adapters or root.anatomy is None:
        return stated
    if not stated.agrees(root.anatomy):
        raise AdapterError(
            "the configuration states another anatomy than the one that the adapters of this model go by: leave it "
            "out, or begin with a model without adapters"
        )
    return root.anatomy


def compare_with_base(root: Host, incompatible: object) -> None:
    """After values were loaded: see anew for which base adapters were made, which compiled code cannot."""
    for adapter in all_adapters(root.adapters).values():
        for state in adapter.shared_states():
            state.other_base(root.base_model)


def attach_adapter(root: Host, name: str, adapter: Adapter) -> None:
    """Attach a complete adapter. The first one is active."""
    attach_beside(root, name, adapter)
    if not root.default and len(root.adapters) == 1:
        activate(root, (name,))


def attach_beside(root: Host, name: str, adapter: Adapter) -> None:
    """Attach a complete adapter, which is not made active. The first one freezes the backbone."""
    anatomy = _anatomy_for(root, adapter.config)
    held = {id(parameter) for parameter in root.adapters.parameters()}
    if not held.isdisjoint(map(id, adapter.parameters())):
        raise AdapterError(
            f"adapter '{name}' has tensors of another adapter, which would be trained with it: a function in heads "
            "must make a new module each time"
        )
    if root.frozen is None:
        root.anatomy = anatomy
        root.frozen = freeze(root)
        attach_model(root)
    elif anatomy != root.anatomy:  # the adapters so far, if any, did without one
        root.anatomy = anatomy
        reattach(root)
    adapter.train(root.training)
    root.adapters._modules[name] = adapter
    adapter.unproven = to_prove(adapter)
    attach_sites(root, adapter)


def replace_adapter(root: Root, name: str, adapter: Adapter) -> None:
    """Put an adapter in the place of another, with its mode; it is active and trained where that was."""
    old = all_adapters(root.adapters)[name]
    trained = dict(old.named_parameters())
    for own, parameter in adapter.named_parameters():
        parameter.requires_grad_(trained[own].requires_grad if own in trained else True)
    adapter.train(old.training)
    root.adapters._modules[name] = adapter
    root.default = root.default
    adapter.unproven = to_prove(adapter)
    forget(root)
    detach_sites(root, old, [other for other in all_adapters(root.adapters).values() if other is not adapter])
    attach_sites(root, adapter)


def activate(root: Root, names: tuple[str, ...]) -> None:
    """Make adapters the active ones, here and wherever nothing else was chosen."""
    root.default = names
    choose_adapters(root, names)


def detach_adapter(root: Root, name: str) -> None:
    """Detach an adapter, and let go of what this thread or task used it for."""
    gone = all_adapters(root.adapters)[name]
    del root.adapters._modules[name]
    root.default = tuple(other for other in root.default if other != name)
    chosen = chosen_adapters(root)
    if chosen is not None:
        choose_adapters(root, tuple(other for other in chosen if other != name))
    forget(root)
    detach_sites(root, gone, list(all_adapters(root.adapters).values()))


def merge_for_good(root: Host, name: str, adapter: Adapter) -> nn.Module:
    """Fold an adapter into the backbone, modules of its own too, take everything else off, and return the backbone."""
    overwrite_weights(root.base_model, folded(root.base_model, name, adapter, beside_own=True))
    base = detach_all(root)
    place_own_modules(base, adapter)
    return base


def detach_all(root: Host) -> nn.Module:
    """Take everything off the backbone, and return it as it was."""
    base = root.base_model
    detach_model(root)
    if root.frozen is not None:
        restore(base, root.frozen)
    root.adapters = nn.ModuleDict()
    root.default, root.frozen = (), None
    choose_adapters(root, None)
    forget(root)
    base._modules.pop(CHILD, None)
    return base
