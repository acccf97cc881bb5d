"""Freeze a backbone, and have it again as it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from point_peft.adapting.attaching import frozen_norms
from point_peft.adapting.site import CHILD
from point_peft.running.forward import Root


@dataclass(kw_only=True)
class Frozen:
    """A backbone's states from before it was frozen, to be restored."""

    requires_grad: dict[str, bool]
    """By the name of a parameter."""
    norm_modes: dict[str, bool]
    """By the path of a module with running statistics: whether it would be in train mode."""


def freeze(root: Root) -> Frozen:
    """Let no parameter of a backbone be trained and no running statistic move."""
    parameters = own_parameters(root.base_model)
    frozen = Frozen(
        requires_grad={name: parameter.requires_grad for name, parameter in parameters.items()},
        norm_modes={path: module.training for path, module in frozen_norms(root).items()},
    )
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for module in frozen_norms(root).values():
        module.training = False
    return frozen


def hold_norms(root: Root, frozen: Frozen, mode: bool) -> None:
    """After train() or eval(): running statistics still do not move, and what is restored is what was asked for."""
    for path, module in frozen_norms(root).items():
        frozen.norm_modes[path] = mode
        module.training = False


def restore(base: nn.Module, frozen: Frozen) -> None:
    """Give a backbone back the states from before it was frozen."""
    for name, parameter in base.named_parameters():
        if name in frozen.requires_grad:
            parameter.requires_grad_(frozen.requires_grad[name])
    for path, mode in frozen.norm_modes.items():
        base.get_submodule(path).training = mode


def own_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a backbone by name, without those of the adapters that it may hold."""
    return {name: p for name, p in base.named_parameters() if not name.startswith(CHILD + ".")}
