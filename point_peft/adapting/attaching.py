"""Attach hooks to the modules of a backbone, and take them off."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.coordinates import check_tokens, tap_input, tap_output
from point_peft.adapting.hooks import PLAIN, after_parts, before_parts, enter_model, leave_model
from point_peft.adapting.replacing import changed_links, follow, links_of
from point_peft.adapting.second_pass import end_at_last_block, keep_stem, reuse_stem, see_trunk, trunk_of
from point_peft.adapting.site import CHILD, HOOKS, SITE, Site, backbone_modules, hook, marked, remove_hooks, strip
from point_peft.adapting.weights import begin_reading, end_reading
from point_peft.running.forward import Root
from point_peft.running.nested import Args
from point_peft.torch_private import NormBase


def attach_model(root: Root) -> None:
    """Hook what every adapter needs: the model, where coordinates are seen, the stem, the blocks, frozen norms."""
    base = root.base_model
    marked(root, "")
    base.register_load_state_dict_post_hook(_allow_base_alone)  # type: ignore[no-untyped-call]
    base.register_forward_pre_hook(follow_modules)
    base.register_forward_pre_hook(enter_model, with_kwargs=True)
    base.register_forward_hook(leave_model, with_kwargs=True, always_call=True)
    for module in frozen_norms(root).values():
        module.register_forward_pre_hook(hold_eval)
    anatomy = root.anatomy
    if anatomy is None:
        return
    for path in anatomy.stem:
        module = marked(root, path)
        module.register_forward_pre_hook(reuse_stem, with_kwargs=True)
        module.register_forward_hook(keep_stem, with_kwargs=True)
    trunk = trunk_of(root)
    if trunk:
        marked(root, trunk).register_forward_pre_hook(see_trunk, with_kwargs=True)
    for path in dict.fromkeys(tap.module for stage in anatomy.stages for tap in stage.taps):
        module = marked(root, path)
        module.register_forward_pre_hook(tap_input, with_kwargs=True)
        module.register_forward_hook(tap_output)
    for block in anatomy.blocks:
        marked(root, block.path).register_forward_pre_hook(check_tokens, with_kwargs=True)
    marked(root, anatomy.stages[anatomy.queried].blocks[-1].path).register_forward_hook(end_at_last_block)


@hook
def follow_modules(module: nn.Module, args: Args) -> None:
    """See to it that the modules that are hooked are those that will be called."""
    if torch.compiler.is_compiling():
        return
    site: Site = module.__dict__[SITE]
    changed = changed_links(site)
    if changed:
        follow(site, changed)


def reattach(root: Root) -> None:
    """Hook again what every adapter needs, and what those that there are need."""
    detach_model(root)
    attach_model(root)
    for adapter in root.adapters._modules.values():
        assert isinstance(adapter, Adapter)
        attach_sites(root, adapter)


def note_links(root: Root) -> None:
    """Note which modules have hooks, to find out if others take their places."""
    marked(root, "").__dict__[SITE].links[:] = links_of(root)


def attach_sites(root: Root, adapter: Adapter) -> None:
    """Hook what an adapter needs hooks at, unless it is hooked already."""
    for path in adapter.called():
        module = marked(root, path)
        if before_parts not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(before_parts, with_kwargs=True)
            # After an exception too, what a plain module was given in the place of its tensors is taken away.
            module.register_forward_hook(after_parts, with_kwargs=True, always_call=type(module) in PLAIN)
    for path in adapter.readers:
        module = marked(root, path)
        if begin_reading not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(begin_reading)
            # First: parts at the same module act once it has been read, and the forward, where the model itself reads,
            # ends after that.
            module.register_forward_hook(end_reading, always_call=True, prepend=True)
    note_links(root)


def detach_sites(root: Root, gone: Adapter, others: Sequence[Adapter]) -> None:
    """Unhook what only an adapter that is gone needed hooks at."""
    called = {path for other in others for path in other.called()}
    read = {path for other in others for path in other.readers}
    for path in {*gone.called(), *gone.readers}:
        module = root.base_model.get_submodule(path)
        remove_hooks(module, () if path in called else (before_parts, after_parts))
        remove_hooks(module, () if path in read else (begin_reading, end_reading))
        left = {*module._forward_pre_hooks.values(), *module._forward_hooks.values()} - {hold_eval}
        if left.isdisjoint(HOOKS):
            module.__dict__.pop(SITE, None)
    note_links(root)


def detach_model(root: Root) -> None:
    """Take every hook and reference off the backbone."""
    for module in backbone_modules(root).values():
        strip(module)
    hooks = root.base_model._load_state_dict_post_hooks
    for number in [number for number, function in hooks.items() if function is _allow_base_alone]:
        del hooks[number]


def frozen_norms(root: Root) -> dict[str, nn.Module]:
    """Modules of the backbone that keep running statistics, which training must not move."""
    return {path: module for path, module in backbone_modules(root).items() if isinstance(module, NormBase)}


def _allow_base_alone(module: nn.Module, incompatible: Any) -> None:
    """A checkpoint of the backbone alone loads into a model that also holds adapters."""
    if CHILD not in module._modules:
        return
    own = [key for key, _ in module.named_parameters() if key.startswith(CHILD + ".")]
    missing = incompatible.missing_keys
    if set(own) <= set(missing):
        missing[:] = [key for key in missing if not key.startswith(CHILD + ".")]


@hook
def hold_eval(module: nn.Module, args: Args) -> None:
    """The statistics of a frozen backbone do not move, whoever has called train() on it."""
    module.training = False
