"""The configuration of bottleneck adapters and where in a block they go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from point_peft.anatomy import Anatomy, Block
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.tuners.base import Backbone, Blueprint, Bottleneck, Part, mlp_linears
from point_peft.tuners.bottleneck.parts import NotePart, ParallelPart, SerialPart

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(TunerConfig):
    """Bottleneck adapters; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "BOTTLENECK"

    placement: Literal["houlsby", "pfeiffer", "adaptformer"] = "pfeiffer"
    """After attention and MLP, after the MLP, or beside the MLP."""
    width: int | None = None
    """The channels r in the middle; None: 64 for "adaptformer", else 16."""
    scale: float | None = None
    """The factor s of what is added; None: 0.1 for "adaptformer", else 1."""
    dropout: float = 0.0
    """Dropout in the middle."""
    activation: Literal["gelu", "relu"] | None = None
    """None: as published, GELU for "houlsby", else ReLU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width is None or self.width >= 1, self, "width", "1 or more, or None")
        require(self.scale is None or self.scale > 0, self, "scale", "more than 0, or None")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "0 or more and less than 1")

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        fields = self.target_modules, self.exclude_modules, self.layers_to_transform
        plan = Blueprint()
        for _, block in backbone.select_blocks(self.method, *fields):
            channels = anatomy.stages[anatomy.stage_of(block)].width
            scale = (0.1 if self.placement == "adaptformer" else 1.0) if self.scale is None else self.scale
            if block.mlp is None:
                raise AnatomyError(
                    f"{self.method} adapts the MLP of every block, and '{block.path}' has none that was found: name it "
                    "in config.anatomy, or use LORA, SSF or NORM_TUNING"
                )
            if self.placement == "houlsby":
                site = _attention_output(backbone, anatomy, block)
                plan.parts.append((site, SerialPart(self._adapter(channels), scale)))
            if self.placement != "adaptformer":
                plan.parts.append((block.mlp, SerialPart(self._adapter(channels), scale)))
            else:
                plan.parts += self._parallel(block, block.mlp, channels, scale)
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

    def _parallel(self, block: Block, mlp: str, channels: int, scale: float) -> list[tuple[str, Part]]:
        """The part at the MLP; where that is its last layer, the first one notes what the MLP gets."""
        ends = mlp_linears(block)
        adapter = self._adapter(channels)
        if ends is None or ends[1] != mlp:
            return [(mlp, ParallelPart(adapter, scale, None))]
        return [(ends[0], NotePart(block.path)), (mlp, ParallelPart(adapter, scale, block.path))]


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
