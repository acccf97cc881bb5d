"""The configuration of GEM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.sequence import check_located
from point_peft.schema import Count, at_least
from point_peft.tuners.gem.context_adapter import ContextAdapter
from point_peft.tuners.gem.parts import GEMPart
from point_peft.tuners.gem.spatial_adapter import SpatialAdapter


@dataclass(frozen=True, kw_only=True)
class GEMConfig(TunerConfig):
    """GEM; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "GEM"

    spatial_width: Count = 16
    """The channels r of the sparse convolution."""
    context_width: Count = 36
    """The channels d of the latent tokens and their attention."""
    # Of one alone, neither a softmax over latents nor a neighbourhood depends on anything.
    num_latents: Annotated[int, at_least(2)] = 8
    """The latent tokens m of a block."""
    neighbours: Annotated[int, at_least(2)] = 27
    """The nearest tokens that can lie in the kernel, itself among them; at most as many as there are."""

    def build(self, backbone: Backbone) -> Blueprint:
        plan = Blueprint()
        for number, stage, blocks in self.chosen_stages(backbone):
            check_located(stage, self.method, blocks[0].path)
            for block in blocks:
                spatial = SpatialAdapter(stage.width, self.spatial_width)
                context = ContextAdapter(stage.width, self.context_width, self.num_latents)
                plan.parts.append((block.path, GEMPart(stage, number, spatial, context, self.neighbours)))
        return plan
