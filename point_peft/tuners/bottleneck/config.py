"""The configuration of bottleneck adapters and where in a block they go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import nn

from point_peft.anatomy.description import Anatomy, Block
from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.sequence import at_mlp, mlp_of
from point_peft.schema import Dropout, Limit
from point_peft.tuners.bottleneck.parts import ParallelPart, SerialPart

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(TunerConfig):
    """Bottleneck adapters; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "BOTTLENECK"

    placement: Literal["houlsby", "pfeiffer", "adaptformer"] = "pfeiffer"
    """After attention and MLP, after the MLP, or beside the MLP."""
    width: Annotated[int | None, Limit("1 or more, or None", lambda width: width >= 1)] = None
    """The channels r in the middle; None: 64 for "adaptformer", else 16."""
    scale: Annotated[float | None, Limit("more than 0, or None", lambda scale: scale > 0)] = None
    """The factor s of what is added; None: 0.1 for "adaptformer", else 1."""
    dropout: Dropout = 0.0
    """Dropout in the middle."""
    activation: Literal["gelu", "relu"] | None = None
    """None: as published, GELU for "houlsby", else ReLU."""

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        plan = Blueprint()
        for _, block in self.chosen_blocks(backbone):
            channels = anatomy.stages[anatomy.stage_of(block)].width
            scale = (0.1 if self.placement == "adaptformer" else 1.0) if self.scale is None else self.scale
            mlp = mlp_of(block, self.method)
            if self.placement == "houlsby":
                site = _attention_output(backbone, anatomy, block)
                plan.parts.append((site, SerialPart(self._adapter(channels), scale)))
            if self.placement != "adaptformer":
                plan.parts.append((mlp, SerialPart(self._adapter(channels), scale)))
            else:
                plan.parts += at_mlp(block, ParallelPart(self._adapter(channels), scale, block))
        return plan

    def _adapter(self, channels: int) -> Bottleneck:
        large, activation = self.placement == "adaptformer", self.activation
        if activation is None:
            activation = "gelu" if self.placement == "houlsby" else "relu"
        width = (64 if large else 16) if self.width is None else self.width
        adapter = Bottleneck(channels, width, self.dropout, _ACTIVATIONS[activation]())
        nn.init.kaiming_uniform_(adapter.down.weight, a=math.sqrt(5))
        nn.init.zeros_(adapter.down.bias)
        adapter.zero_up()
        return adapter


def _attention_output(backbone: Backbone, anatomy: Anatomy, block: Block) -> str:
    """The module that gives what the attention adds to the tokens: its projection, itself where that is not called."""
    read = {read.module for read in anatomy.reads}
    inside = isinstance(backbone.modules[block.attention], nn.MultiheadAttention)
    if block.projection is not None and not inside and block.projection not in read:
        return block.projection
    if block.attention == block.path:
        raise AnatomyError(
            f"'{block.path}' has no attention of its own to put an adapter after: use placement=\"pfeiffer\", or name "
            "its projection in config.anatomy"
        )
    return block.attention
