"""Hooks of an adapted module: functions without state."""

from typing import Any

import torch
from torch import nn

from point_peft.adapting.adapter import adapters_by_name, calls_at, get_adapter
from point_peft.adapting.site import CHILD, SITE, Site, here, hook
from point_peft.adapting.weights import adapted_tensors
from point_peft.errors import AdapterError
from point_peft.running.forward import Forward, close_forward, current_forward, open_forward
from point_peft.running.nested import Args, Kwargs
from point_peft.running.reading import enter, leave
from point_peft.running.replay import mark

PLAIN = (nn.Linear, nn.LayerNorm)
"""Classes whose forward only gives their tensors to a function of torch, which can be given others."""


@hook
def enter_model(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    site: Site = module.__dict__[SITE]
    root = site.root
    if module.__dict__.get("_is_replica", False) and CHILD in module._modules:
        root = module._modules[CHILD]  # type: ignore[assignment]  # the replica's own adapters
        root.__dict__["base_model"] = module  # and not the model that was replicated
    forward = open_forward(root, args, kwargs)
    gone = [name for name in forward.active if name not in adapters_by_name(root)]
    if gone:
        raise AdapterError(f"adapter '{gone[0]}' is active in this thread or task, but was deleted: call set_adapter")
    if torch.compiler.is_compiling() or any(name in root.unproven for name in forward.active):
        forward.ran = set()


@hook
def leave_model(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
    _, forward = here(module)
    close_forward(forward)
    if output is None:  # an exception is on its way
        return
    if forward.ran is not None:
        _prove(forward)
    if torch.is_grad_enabled():
        mark(forward.root.key, forward, output)


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


@hook
def before_parts(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    site, forward = here(module)
    if forward.second.owner is not None:
        for part, call in calls_at(forward, (forward.second.owner,), site.path, module):
            if part.in_second_pass:
                args, kwargs = part.before_second(call, args, kwargs)
        return args, kwargs
    if not forward.active:
        return None
    calls = calls_at(forward, forward.active, site.path, module)
    forward.second.acted = forward.second.acted or bool(calls)
    if calls and _is_plain(module) and all(part.tuned and not part.by_weight for part, _ in calls):
        # With its own tensors in place of the base's, the module needs no difference to be added to what it gives.
        adapted = adapted_tensors(module, calls)
        own = {id(base): (site.path, value) for base, value in adapted.values()}
        enter(module, own, lambda: current_forward(site.root) is forward)
        return None
    for part, call in calls:
        if not part.by_weight:
            args, kwargs = part.before(call, args, kwargs)
    return args, kwargs


def _is_plain(module: nn.Module) -> bool:
    """Tell a module that does no more than to give its tensors to a function, which can be given others."""
    own = "forward" not in module.__dict__  # as accelerate sets it, which moves the tensors
    return own and type(module) in PLAIN and not torch.compiler.is_compiling()


@hook
def after_parts(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    site: Site = module.__dict__[SITE]
    read = None if torch.compiler.is_compiling() else leave(module)
    if output is None and type(module) in PLAIN:  # an exception is on its way
        return None
    forward = current_forward(site.root)
    if not forward.active:
        return None
    for part, call in reversed(calls_at(forward, forward.active, site.path, module)):
        if part.by_weight:
            continue
        if read is None:
            output = part.after(call, args, kwargs, output)
        if forward.ran is not None and (read is None or site.path in read):
            forward.ran.add((call.adapter, site.path))
    if forward.inputs is None and not forward.recomputing and torch.is_grad_enabled() and forward.handover.is_empty:
        # A direct call, which no end of a model's forward will mark. Not where blocks hand on tensors: the forward
        # holds those, and the mark would hold the forward in a circle that no garbage collector sees.
        mark(forward.root.key, forward, output)
    return output
