"""Scaling and shifting channels: of what a layer gives, or of patch tokens where a module makes them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy, Block, Tap
from point_peft.anatomy.structure import is_norm, projects, weight_to_adapt
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Call, Part
from point_peft.parts.tuned import per_channel
from point_peft.running.nested import Args, Kwargs, fetch, put


def channels_of(module: nn.Module) -> int | None:
    """The channels that a linear layer, a norm with a weight or a fused projection gives; None for anything else."""
    projection = weight_to_adapt(module)
    if projection is not None:
        return projection[1][0]
    weight = module._parameters.get("weight")
    return weight.shape[0] if is_norm(module) and weight is not None and weight.ndim == 1 else None


def block_sites(block: Block) -> list[str]:
    """Norms and linear layers of a block, or the attention itself where it has its projections inside."""
    made = block.qkv or (block.attention,)
    return [*block.norms, *filter(None, made), *filter(None, [block.projection]), *block.linears]


def patch_taps(anatomy: Anatomy) -> dict[str, tuple[Tap, int]]:
    """The modules that make patch tokens: where in their output these are, and how many channels they have."""
    taps = [(stage.patch_tokens, stage.width) for stage in anatomy.stages if stage.patch_tokens is not None]
    return {tap.module: (tap, width) for tap, width in taps if tap.side == "output"}


def key_layers(anatomy: Anatomy) -> set[str]:
    """The layers that make keys alone, whose shift would get no gradient.

    A softmax takes a shift of all keys away; where queries and keys are subtracted, the queries have it.
    """
    return {path for block in anatomy.blocks for path in block.qkv if projects(block, path) == "k"}


class LayerScaleShift(Part):
    """y <- gamma * y + beta on the channels of what a linear layer or a norm gives.

    Folded in, or where the module's weights are read by another: W <- gamma W by rows, b <- gamma * b + beta.
    """

    def __init__(self, module: nn.Module, *, shift: bool, only_mergeable: bool = False) -> None:
        super().__init__()
        channels = channels_of(module)
        assert channels is not None
        # Of an attention with its projections inside, the fused one is meant, whose weight the attention reads.
        self.by_weight = isinstance(module, nn.MultiheadAttention)
        inside = "in_proj_" if self.by_weight else ""
        self.names = f"{inside}weight", f"{inside}bias"
        self.takes_shift = module._parameters.get(self.names[1]) is not None
        self.gamma = nn.Parameter(torch.ones(channels))
        shifted = shift and (self.takes_shift or not (only_mergeable or self.by_weight))
        self.beta = nn.Parameter(torch.zeros(channels)) if shifted else None
        self.mergeable = self.takes_shift or not shifted

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        scaled = output * per_channel(self.gamma, call.module, output).to(output.dtype)
        return scaled if self.beta is None else scaled + per_channel(self.beta, call.module, output).to(output.dtype)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        weight: Tensor = getattr(module, self.names[0])
        folded = {self.names[0]: weight * self.gamma.reshape(-1, *[1] * (weight.ndim - 1))}
        if self.takes_shift:
            scaled = getattr(module, self.names[1]) * self.gamma
            folded[self.names[1]] = scaled if self.beta is None else scaled + self.beta
        return folded

    def act_by_weight(self, path: str) -> None:
        if not self.takes_shift:  # without a bias, the weights alone have no place for it
            self.beta = None
            self.mergeable = True
        super().act_by_weight(path)


class PatchScaleShift(Part):
    """t <- gamma * t + beta on patch tokens (b, g, c) where a module gives them."""

    def __init__(self, tap: Tap, channels: int) -> None:
        super().__init__()
        self.tap = tap
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        tokens = fetch(output, self.tap.steps)
        changed = tokens * self.gamma.to(tokens.dtype) + self.beta.to(tokens.dtype)
        return put(output, self.tap.steps, changed)


def scale_shift_parts(
    backbone: Backbone,
    method: str,
    paths: Iterable[str],
    layer: type[LayerScaleShift],
    patch: type[PatchScaleShift],
    only_mergeable: bool = False,
) -> list[tuple[str, Part]]:
    """A `layer` for each linear layer and norm among modules, a `patch` for what else makes patch tokens."""
    anatomy = backbone.known_anatomy(method)
    patches, keys = patch_taps(anatomy), key_layers(anatomy)
    parts: list[tuple[str, Part]] = []
    for path in paths:
        module = backbone.modules[path]
        if channels_of(module) is not None:
            parts.append((path, layer(module, shift=path not in keys, only_mergeable=only_mergeable)))
        elif path not in patches:
            raise AnatomyError(
                f"'{path}' is a {type(module).__name__}; {method} adapts linear layers, norms with a weight and the "
                "modules that make patch tokens: leave it out with exclude_modules"
            )
        elif not only_mergeable:
            parts.append((path, patch(*patches[path])))
    return parts
