"""Trained copies of the backbone's own tensors and modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Block
from point_peft.anatomy.structure import has_parameters, is_norm
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Call, Part
from point_peft.running.nested import Args, Kwargs
from point_peft.torch_private import BatchNorm, NormBase

if TYPE_CHECKING:
    from typing_extensions import Self


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


class TunedCopy(Part):
    """A part whose tensors are trained copies of the module's, by the same names.

    Where such parts are all that acts on a plain linear layer or LayerNorm, it runs with their tensors in the place of
    its own; elsewhere `after` adds the difference. Where two methods of one adapter tune the same tensor, it is tuned
    once.
    """

    mergeable = True

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        # By name: DataParallel's replicas do not have them as parameters.
        return {name: getattr(self, name) for name in self.tuned}


class TunedModule(Part):
    """A module of the adapter's own, whose output replaces that of the base's module."""

    def __init__(self, module: nn.Module, *, holds_statistics: bool = False) -> None:
        super().__init__()
        self.module = module
        self.holds_statistics = holds_statistics
        """True if running statistics in it stay as they are in training too."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.module.modules() if self.holds_statistics else ():
            if isinstance(module, NormBase):
                module.training = False
        return self

    @property
    def own_module(self) -> nn.Module:
        return self.module

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return self.module(*args, **kwargs)

    def file_name(self, name: str) -> str:
        return name.removeprefix("module.")


class TunedBias(TunedCopy):
    """A trained copy of a module's bias, for a module that adds its bias to the channels of its output.

    The base keeps its own, and several adapters can be active: what each has changed adds up.
    """

    tuned = ("bias",)

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = _copy(bias)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        shift = self.bias - getattr(call.module, "bias")  # noqa: B009 - a replica's is a tensor
        return output + per_channel(shift, call.module, output).to(output.dtype)


def per_channel(values: Tensor, module: nn.Module, output: Tensor) -> Tensor:
    """One value a channel (c,), shaped so that it meets the channels of what a norm or a layer returns."""
    # A convolution's channels are followed by its places, a BatchNorm's are the second; else they come last.
    behind = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0
    if isinstance(module, BatchNorm):
        behind = output.ndim - 2
    return values.reshape(-1, *[1] * behind)


class TunedNorm(TunedCopy):
    """Trained copies of a norm's weight and, if it has one, bias; `after` knows norms that torch has a function for."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.tuned = tuple(name for name in ("weight", "bias") if norm._parameters.get(name) is not None)
        for name in self.tuned:
            self.register_parameter(name, _copy(norm.get_parameter(name)))

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        norm, x = call.module, args[0] if args else kwargs["input"]
        change = {name: per_channel(getattr(self, name) - getattr(norm, name), norm, output) for name in self.tuned}
        changed = _normalised(norm, x) * change["weight"]
        return output + (changed + change["bias"] if "bias" in change else changed).to(output.dtype)


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """The output of a norm before its weight and bias; a BatchNorm's frozen statistics do not move."""
    if isinstance(norm, nn.LayerNorm):
        return nn.functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return nn.functional.rms_norm(x, norm.normalized_shape, eps=norm.eps)
    assert isinstance(norm, BatchNorm)
    stats = norm.running_mean, norm.running_var
    mean, var = (None if s is None else s.to(torch.promote_types(s.dtype, x.dtype)) for s in stats)
    return nn.functional.batch_norm(x, mean, var, training=mean is None, eps=norm.eps)


def tuned_biases(backbone: Backbone, paths: Sequence[str]) -> list[tuple[str, Part]]:
    """A `TunedBias` for each of the modules; each must have a bias."""
    parts: list[tuple[str, Part]] = []
    for path in paths:
        module = backbone.modules[path]
        bias = module._parameters.get("bias")
        if bias is None:
            raise AnatomyError(f"'{path}' ({type(module).__name__}) has no bias to tune")
        parts.append((path, TunedBias(bias)))
    return parts


def block_biases(backbone: Backbone, blocks: Sequence[Block]) -> list[str]:
    """The norms, attention projections and MLP layers of blocks that have a bias."""
    paths = [path for b in blocks for path in (*b.norms, *filter(None, [b.projection]), *b.linears)]
    return [path for path in paths if backbone.modules[path]._parameters.get("bias") is not None]


def tuned_norms(backbone: Backbone, paths: Sequence[str]) -> list[tuple[str, Part]]:
    """A `TunedNorm` for each of the modules; each must be a norm with a weight."""
    parts: list[tuple[str, Part]] = []
    for path in paths:
        norm = backbone.modules[path]
        if not is_norm(norm) or norm._parameters.get("weight") is None:
            raise AnatomyError(f"'{path}' is a {type(norm).__name__}; only a norm with a weight can be tuned")
        part = TunedNorm(norm)
        if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm, BatchNorm)):
            part.act_by_weight(path)  # how it normalises is not known
        parts.append((path, part))
    return parts


def first_layers(backbone: Backbone, path: str) -> str:
    """The first child with parameters of a module, or of what it holds where that is all it holds."""
    children = [f"{path}.{name}" for name, child in backbone.modules[path].named_children() if has_parameters(child)]
    if not children:
        return path
    return children[0] if len(children) > 1 else first_layers(backbone, children[0])
