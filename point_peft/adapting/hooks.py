"""Hooks of an adapted module: functions without state."""

from typing import Any

import torch
from torch import nn

from point_peft.adapting import border
from point_peft.adapting.adapter import adapters_by_name, calls_at
from point_peft.adapting.fitting import fit_inputs
from point_peft.adapting.proving import begin_proof, end_proof, note_run
from point_peft.adapting.site import CHILD, SITE, Site, here, hook
from point_peft.adapting.weights import adapted_tensors
from point_peft.errors import AdapterError
from point_peft.running.forward import close_forward, current_forward, open_forward
from point_peft.running.nested import Args, Kwargs
from point_peft.running.reading import enter, leave
from point_peft.running.replay import mark

PLAIN = (nn.Linear, nn.LayerNorm)
"""Classes whose forward only gives their tensors to a function of torch, which can be given others."""


@hook
def enter_model(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    site: Site = module.__dict__[SITE]
    root = site.root
    if module.__dict__.get("_is_replica", False) and CHILD in module._modules:
        root = module._modules[CHILD]  # type: ignore[assignment]  # the replica's own adapters
        root.__dict__["base_model"] = module  # and not the model that was replicated
    forward = open_forward(root, args, kwargs)
    gone = [name for name in forward.active if name not in adapters_by_name(root)]
    if gone:
        raise AdapterError(f"adapter '{gone[0]}' is active in this thread or task, but was deleted: call set_adapter")
    args, kwargs = fit_inputs(forward)
    begin_proof(forward, module)
    return args, kwargs


@hook
def leave_model(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
    _, forward = here(module)
    close_forward(forward)
    end_proof(forward, module, output)
    if output is not None and torch.is_grad_enabled():
        mark(forward.root.key, forward, output)


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
    if calls and _is_plain(module) and all(part.tuned and not part.by_weight for part, _ in calls):
        # With its own tensors in place of the base's, the module needs no difference to be added to what it gives.
        adapted = adapted_tensors(module, calls)
        own = {id(base): (site.path, value) for base, value in adapted.values()}
        enter(module, own, lambda: current_forward(site.root) is forward)
        forward.second.acted = True
        return None
    for part, call in calls:
        if not part.by_weight:
            args, kwargs = border.before(part, call, args, kwargs)
        forward.second.acted = forward.second.acted or not part.restores
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
            output = border.after(part, call, args, kwargs, output)
        if read is not None and site.path not in read:
            raise AdapterError(
                f"'{site.path}' ({type(module).__name__}) did not use its own {' and '.join(part.tuned)}, so the "
                f"{type(part).__name__} of adapter '{call.adapter}' there has no effect: something else, such as "
                "pruning or a parametrization, has put another tensor in the place since"
            )
        note_run(forward, part, call)
    if forward.inputs is None and not forward.recomputing and torch.is_grad_enabled() and forward.handover.is_empty:
        # A direct call, which no end of a model's forward will mark. Not where blocks hand on tensors: the forward
        # holds those, and the mark would hold the forward in a circle that no garbage collector sees.
        mark(forward.root.key, forward, output)
    return output
