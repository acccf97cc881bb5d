"""Modules of a backbone that somebody has put others in the place of since hooks were put on them."""

from dataclasses import replace

from torch import nn

from point_peft.adapting.site import Link, Site, backbone_modules, has_hooks, move_hooks
from point_peft.errors import AdapterError
from point_peft.running.forward import Root
from point_peft.torch_private import BatchNorm, is_compiled


def links_of(root: Root) -> list[Link]:
    """The links of the backbone's tree of modules that lead to modules with hooks of this library."""
    modules = backbone_modules(root)
    links: dict[str, Link] = {}
    for path, module in modules.items():
        steps = path.split(".") if path and has_hooks(module) else []
        for end, name in enumerate(steps):
            below = ".".join(steps[: end + 1])
            links.setdefault(below, Link(below, modules[".".join(steps[:end])], name, modules[below]))
    return list(links.values())


def changed_links(site: Site) -> list[Link]:
    """Those of the links, noted at the site of the model itself, that lead elsewhere by now, or into compiled code."""
    return [
        link for link in site.links if link.parent._modules.get(link.name) is not link.child or is_compiled(link.child)
    ]


def follow(site: Site, changed: list[Link]) -> None:
    """Come to terms with changed links: a norm that was converted takes over what was attached to the one before.

    Raises `AdapterError` where what was attached can act no more. What was only wrapped acts on.
    """
    converted: list[tuple[nn.Module, nn.Module]] = []
    for link in changed:
        old, new = link.child, link.parent._modules.get(link.name)
        if new is not None and is_compiled(new):
            raise AdapterError(
                f"'{link.path}' ({type(old).__name__}) was compiled since something was attached to it or in it, which "
                "would not act there as it should: compile the whole adapted model, torch.compile(model)"
            )
        if isinstance(new, nn.SyncBatchNorm) and _is_converted(old, new):
            converted.append((old, new))
        elif new is None or not {module for module in old.modules() if has_hooks(module)} <= set(new.modules()):
            what = "taken out" if new is None else f"replaced by a {type(new).__name__}"
            raise AdapterError(
                f"'{link.path}' ({type(old).__name__}) was {what} since something was attached to it or in it, which "
                "acts no more: change the model before an adapter is added to it"
            )
    for old, new in converted:
        move_hooks(old, new)
    site.links[:] = [replace(link, child=link.parent._modules[link.name] or link.child) for link in site.links]


def _is_converted(old: nn.Module, new: nn.SyncBatchNorm) -> bool:
    """Tell a norm that `convert_sync_batchnorm` has made of another: it has the very tensors."""
    return isinstance(old, BatchNorm) and old.running_mean is new.running_mean and old.weight is new.weight
