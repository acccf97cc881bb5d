"""Sites: what an adapted module knows of itself, and how the modules of a backbone are reached."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy, Stage
from point_peft.anatomy.structure import Modules
from point_peft.running.forward import Forward, Root, current_forward

SITE = "_point_peft_site"
"""The attribute of an adapted module, not registered, that holds its `Site`."""
CHILD = "point_peft"
"""The name under which a model that keeps its own class holds its adapters."""
HOOKS: set[Callable[..., Any]] = set()
"""Every function that is put on modules of a backbone as a hook."""
F = TypeVar("F", bound=Callable[..., Any])


def hook(function: F) -> F:
    """Mark a function as a hook, so that it is found on a module again and taken off."""
    HOOKS.add(function)
    return function


@dataclass(frozen=True)
class Link:
    """A module's place in another: whoever looks there finds the module, unless somebody has put another there."""

    path: str
    parent: nn.Module
    name: str
    child: nn.Module


@dataclass(frozen=True)
class Site:
    """A module's knowledge of itself: its path in the backbone and who holds the adapters."""

    path: str
    root: Root
    links: list[Link] = field(default_factory=list)
    """Of the model itself: the links that lead to modules with hooks of this library, as they were found."""


def here(module: nn.Module) -> tuple[Site, Forward]:
    """The site of an adapted module, and the forward that it runs in."""
    site: Site = module.__dict__[SITE]
    return site, current_forward(site.root)


def floating_parameter(modules: Modules) -> Tensor | None:
    """A parameter of a backbone, whose device its adapters take; None if it has none."""
    return next((p for p in modules[""].parameters() if p.is_floating_point()), None)


def backbone_modules(root: Root) -> dict[str, nn.Module]:
    """Every module of the backbone by path, under each of its names, without the adapters that it may hold."""
    modules = {"": root.base_model}
    for name, child in root.base_model._modules.items():
        if child is not None and name != CHILD:
            modules |= child.named_modules(prefix=name, remove_duplicate=False)
    return modules


def first_names(modules: Modules) -> dict[int, str]:
    """The first path of each module, by the module's id; some have several."""
    paths: dict[int, str] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), path)
    return paths


def clean_copy(module: nn.Module) -> nn.Module:
    """A copy of a module of the backbone without the hooks of this library."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        site = child.__dict__.get(SITE)
        if site is not None:
            memo[id(site)] = site
    copied = copy.deepcopy(module, memo)
    for child in copied.modules():
        strip(child)
    return copied


def marked(root: Root, path: str) -> nn.Module:
    """The module at a path of the backbone, which from now on knows its site."""
    module = root.base_model.get_submodule(path)
    if SITE not in module.__dict__:
        module.__dict__[SITE] = Site(path, root)
    return module


def has_hooks(module: nn.Module) -> bool:
    """Tell whether this library has put hooks on a module."""
    return not HOOKS.isdisjoint((*module._forward_pre_hooks.values(), *module._forward_hooks.values()))


def strip(module: nn.Module) -> None:
    """Take every hook and reference of this library off a module."""
    module.__dict__.pop(SITE, None)
    remove_hooks(module, HOOKS)


def move_hooks(module: nn.Module, other: nn.Module) -> None:
    """Take every hook and reference of this library off a module and put them on another, which runs in its place."""
    if SITE in module.__dict__:
        other.__dict__[SITE] = module.__dict__[SITE]
    for (registered, flags), (there, marks) in zip(_hooks(module), _hooks(other), strict=True):
        own = {number: hook for number, hook in registered.items() if hook in HOOKS}
        there.update(own)
        for flag, mark in zip(flags, marks, strict=True):
            mark.update({number: True for number in own if number in flag})
    strip(module)


def _hooks(module: nn.Module) -> tuple[tuple[dict[int, Any], tuple[dict[int, bool], ...]], ...]:
    """The hooks of a module by number, ahead of its forward and after it, each kind with what marks some of them."""
    return (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    )


def remove_hooks(module: nn.Module, hooks: Collection[Callable[..., Any]]) -> None:
    """Take hooks off a module, by function and not by handle: a handle knows one model, and models are copied."""
    for registered, flags in _hooks(module):
        for number in [number for number, hook in registered.items() if hook in hooks]:
            del registered[number]
            for flag in flags:
                flag.pop(number, None)


def anatomy_of(root: Root) -> Anatomy:
    """The anatomy that the adapters of a model go by, for hooks that are attached by what it says."""
    assert root.anatomy is not None
    return root.anatomy


def stage_at(anatomy: Anatomy, path: str) -> tuple[int, Stage]:
    """The number and the stage of the block at a path."""
    return next((i, stage) for i, stage in enumerate(anatomy.stages) if any(b.path == path for b in stage.blocks))
