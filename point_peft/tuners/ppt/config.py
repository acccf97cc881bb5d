"""The configuration of PPT: how the cloud is grouped again, and what of the backbone is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.second_grouping import Init, modules_to_tune, stage_to_group
from point_peft.parts.sequence import note_stream
from point_peft.schema import Count
from point_peft.tuners.ppt.parts import PositionMlps, PromptedBlock, PromptGrouping


@dataclass(frozen=True, kw_only=True)
class PPTConfig(TunerConfig):
    """PPT on the blocks of a backbone with one stage; `target_modules` names blocks, None means all.

    `num_groups` and `group_size` are of the second grouping; clouds of fewer points are taken as they are.
    `mlp_width` is the hidden width of M1, M2 and M3. `init="identity"` lets them begin with nothing; "published" begins
    all their layers as torch does. `tuned_modules` are trained whole, None: the positional embedding and the first
    layers of the tokenizer. `tuned_tokens` names prefix tokens and positions to train, None: all.
    """

    method: ClassVar[str] = "PPT"

    num_groups: Count = 128
    group_size: Count = 32
    mlp_width: Count = 256
    init: Init = "identity"
    tuned_modules: str | Sequence[str] | None = None
    tuned_tokens: str | Sequence[str] | None = None

    @property
    def identity_at_init(self) -> bool:
        """The prompts themselves change what the blocks make of the other tokens."""
        return False

    def build(self, backbone: Backbone) -> Blueprint:
        stage = stage_to_group(backbone, self.method)
        chosen = self.chosen_blocks(backbone)
        plan = Blueprint(modules=modules_to_tune(backbone, stage, self.tuned_modules))
        plan.shared["token_mlps"] = PositionMlps(stage.width, self.mlp_width, self.init)
        plan.parts.append((stage.tokenizer[-1], PromptGrouping(stage, 0, self.num_groups, self.group_size)))
        for _, block in chosen:
            plan.parts += [(block.path, PromptedBlock(stage, 0)), note_stream(block, self.method)]
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan
