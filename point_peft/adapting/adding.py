"""Add adapters to a model and take them off again."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.attaching import attach_model, attach_sites, detach_model, detach_sites
from point_peft.adapting.freezing import Frozen, freeze, restore
from point_peft.adapting.naming import all_adapters
from point_peft.adapting.site import CHILD, backbone_modules
from point_peft.anatomy.checking import check_anatomy
from point_peft.anatomy.description import Anatomy
from point_peft.config import PeftConfig
from point_peft.errors import AdapterError
from point_peft.parts.backbone import Backbone
from point_peft.running.activation import choose_adapters, chosen_adapters
from point_peft.running.forward import Root, forget


class Host(Root, Protocol):
    """The module that holds adapters, as adding and removing changes it."""

    why_unknown: str
    """Why there is no anatomy."""
    frozen: Frozen | None
    """The backbone's states from before the first adapter; None while nothing is attached."""
    training: bool


def backbone_for(root: Host, config: PeftConfig | None = None) -> Backbone:
    """The backbone as a further adapter of this configuration sees it; without one, as those of the model do."""
    anatomy = root.anatomy if config is None else _anatomy_for(root, config)
    return Backbone(
        model=root.base_model, modules=backbone_modules(root), anatomy=anatomy, why_unknown=root.why_unknown
    )


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


def attach_adapter(root: Host, name: str, adapter: Adapter) -> None:
    """Attach a complete adapter. The first one freezes the backbone and is active."""
    anatomy = _anatomy_for(root, adapter.config)
    if root.frozen is None:
        root.anatomy = anatomy
        root.frozen = freeze(root)
        attach_model(root)
    elif anatomy != root.anatomy:  # the adapters so far, if any, did without one
        root.anatomy = anatomy
        detach_model(root)
        attach_model(root)
        for other in all_adapters(root.adapters).values():
            attach_sites(root, other)
    adapter.train(root.training)
    root.adapters._modules[name] = adapter
    root.unproven.add(name)
    attach_sites(root, adapter)
    if not root.default and len(root.adapters) == 1:
        activate(root, (name,))


def activate(root: Root, names: tuple[str, ...]) -> None:
    """Make adapters the active ones, here and wherever nothing else was chosen."""
    root.default = names
    choose_adapters(root, names)


def detach_adapter(root: Root, name: str) -> None:
    """Detach an adapter, and let go of what this thread or task used it for."""
    gone = all_adapters(root.adapters)[name]
    del root.adapters._modules[name]
    root.unproven.discard(name)
    root.default = tuple(other for other in root.default if other != name)
    chosen = chosen_adapters(root)
    if chosen is not None:
        choose_adapters(root, tuple(other for other in chosen if other != name))
    forget(root)
    detach_sites(root, gone, list(all_adapters(root.adapters).values()))


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
