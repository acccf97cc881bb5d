"""The configuration of PointGST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.sequence import check_located, note_stream
from point_peft.schema import Count, at_least
from point_peft.tuners.point_gst.parts import SpectralAdapter, SpectralPart, Transform


@dataclass(frozen=True, kw_only=True)
class PointGSTConfig(TunerConfig):
    """PointGST; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "POINT_GST"

    rank: Count = 36
    """The channels r that are transformed."""
    local_size: Annotated[int, at_least(2)] = 32
    """Tokens in a local graph, at most."""
    transform: Transform = "fourier"
    """U a(U^T h), or with U and U^T exchanged, as published."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all."""

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        plan = Blueprint()
        for index, stage, blocks in self.chosen_stages(backbone):
            check_located(stage, self.method, blocks[0].path)
            for block in blocks:
                # Where the prediction is made from the prefix tokens alone, nothing reads the last block's patches.
                scales = 2 if anatomy.patches_read or block != anatomy.blocks[-1] else 0
                adapter = SpectralAdapter(stage.width, self.rank, self.transform, scales=scales)
                plan.parts.append((block.path, SpectralPart(stage, index, adapter, self.local_size)))
                plan.parts.append(note_stream(block, self.method))
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan
