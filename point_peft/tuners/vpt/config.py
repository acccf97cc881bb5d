"""The configuration of VPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.sequence import check_takes_prompts
from point_peft.schema import Count, Dropout
from point_peft.tuners.vpt.parts import DeepPrompts, ShallowPrompts


@dataclass(frozen=True, kw_only=True)
class VPTConfig(TunerConfig):
    """VPT; `target_modules` and the like choose among the transformer blocks."""

    method: ClassVar[str] = "VPT"

    num_prompts: Count = 10
    """Prompts p that a block gets."""
    mode: Literal["deep", "shallow"] = "deep"
    """Prompts of its own for each block, or one set that enters at the first block of a stage and stays to its last."""
    prompt_dropout: Dropout = 0.0
    """Dropout of the prompts' channels."""

    @property
    def identity_at_init(self) -> bool:
        """Prompts are attended from the start."""
        return False

    def build(self, backbone: Backbone) -> Blueprint:
        last = backbone.known_anatomy(self.method).blocks[-1]
        kind = DeepPrompts if self.mode == "deep" else ShallowPrompts
        plan = Blueprint()
        for number, stage, blocks in self.chosen_stages(backbone):
            check_takes_prompts(stage, self.method, "Use a method that adapts the layers, as LORA or SSF")
            for block in blocks:
                pooled = block == last and bool(backbone.pooled)
                count = self.num_prompts if self.mode == "deep" or block == blocks[0] else 0
                plan.parts.append((block.path, kind(stage, number, count, self.prompt_dropout, pooled=pooled)))
        return plan
