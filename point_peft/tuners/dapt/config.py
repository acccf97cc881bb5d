"""The configuration of DAPT and where its parts go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from point_peft.anatomy.description import Anatomy, Block, Stage
from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Part
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.scale_shift import block_sites, channels_of, key_layers, patch_taps
from point_peft.parts.sequence import at_mlp, check_takes_prompts, mlp_of
from point_peft.schema import Count, Dropout
from point_peft.tuners.dapt.parts import (
    AdapterPart,
    DynamicAdapter,
    InternalPrompts,
    LayerTFTS,
    PatchTFTS,
    PositionOnce,
)

# The pools of a head of the adapter's own that read what becomes of the prompts.
READS_PROMPTS = frozenset({"prompt", "all_max", "all_mean", "raw_mean"})


@dataclass(frozen=True, kw_only=True)
class DAPTConfig(TunerConfig):
    """DAPT; `target_modules` and the like choose among the transformer blocks.

    The patch tokens and what the final norm gives are scaled and shifted whatever is chosen.
    """

    method: ClassVar[str] = "DAPT"

    width: Count = 64
    """The channels r in the middle of the adapter; 72 was published for ModelNet40."""
    dropout: Dropout = 0.1
    """Of the adapter."""
    internal_prompts: bool = True
    """Let each block make a prompt for the blocks after it."""
    position: Literal["backbone", "once"] = "backbone"
    """When positions are added: as the backbone does, or ahead of the first block only, as published."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all."""
    init: Literal["identity", "published"] = "identity"
    """The start of gamma and beta: at one and zero, or normally distributed around them."""

    @property
    def identity_at_init(self) -> bool:
        """A fresh adapter is the backbone plus its prompts."""
        return self.init == "identity" and not self.internal_prompts

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        chosen = [block for _, block in self.chosen_blocks(backbone)]
        for block in chosen:
            mlp_of(block, self.method)
        plan, prompted = Blueprint(), dict[str, Stage]()
        for number, stage, blocks in self.chosen_stages(backbone):
            if self.position == "once" and stage.position == "every_block":
                for block in stage.blocks:
                    plan.parts.append((block.path, PositionOnce(stage, number, first=block == stage.blocks[0])))
            if self.internal_prompts:
                made = self._prompts(backbone, anatomy, number, blocks)
                plan.parts += made
                prompted |= {path: stage for path, part in made if part.gamma is not None}
        for block in chosen:
            channels = anatomy.stages[anatomy.stage_of(block)].width
            adapter = DynamicAdapter(channels, self.width, self.dropout)
            plan.parts += at_mlp(block, AdapterPart(adapter, block, prompted=prompted.get(block.path)))
        # After the adapters: where both are at one layer, it is scaled and shifted before they add to it.
        plan.parts += self._scale_shift(backbone, anatomy, chosen)
        if self.init == "published":
            for _, planned in plan.parts:
                _start_as_published(planned)
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan

    def _prompts(
        self, backbone: Backbone, anatomy: Anatomy, number: int, blocks: Sequence[Block]
    ) -> list[tuple[str, InternalPrompts]]:
        """The parts at those blocks of a stage that get prompts or make one."""
        stage = anatomy.stages[number]
        check_takes_prompts(stage, self.method, "Set internal_prompts=False to do without them")
        parts: list[tuple[str, InternalPrompts]] = []
        for block in blocks:
            # What the last of them would make is read by a head that pools it, or by itself where it runs again.
            final = block == anatomy.blocks[-1]
            pooled = final and not READS_PROMPTS.isdisjoint(backbone.pooled)
            makes = pooled or block != blocks[-1] or (final and anatomy.last_block_calls > 1)
            if makes or block != blocks[0]:
                part = InternalPrompts(stage, number, begins=block == blocks[0], makes=makes, pooled=pooled)
                parts.append((block.path, part))
        return parts

    @staticmethod
    def _scale_shift(backbone: Backbone, anatomy: Anatomy, blocks: Sequence[Block]) -> list[tuple[str, Part]]:
        """TFTS on the patch tokens, on all norms and linear layers of the blocks, and on the final norm."""
        patches, keys = patch_taps(anatomy), key_layers(anatomy)
        inside = [path for block in blocks for path in block_sites(block)]
        parts: list[tuple[str, Part]] = []
        for path in dict.fromkeys([*patches, *inside, *anatomy.final_norms]):
            module = backbone.modules[path]
            if channels_of(module) is not None:
                parts.append((path, LayerTFTS(module, shift=path not in keys)))
            elif path in patches:
                parts.append((path, PatchTFTS(*patches[path])))
        return parts


def _start_as_published(part: Part) -> None:
    if isinstance(part, (LayerTFTS, PatchTFTS, InternalPrompts)):
        for tensor, mean in ((part.gamma, 1.0), (part.beta, 0.0)):
            if tensor is not None:
                nn.init.normal_(tensor, mean, 0.02)
