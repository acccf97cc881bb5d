"""The configuration of IDPT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from point_peft.config import TunerConfig
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.sequence import check_takes_prompts
from point_peft.schema import Count, Limit
from point_peft.tuners.idpt.generator import PromptGenerator
from point_peft.tuners.idpt.parts import FeaturePart, InstancePrompt, PromptPosition


@dataclass(frozen=True, kw_only=True)
class IDPTConfig(TunerConfig):
    """IDPT; `target_modules` and the like choose among the transformer blocks of the last stage."""

    method: ClassVar[str] = "IDPT"

    prompt_layer: Annotated[int | None, Limit("a block's number from 0", lambda number: number >= 0)] = None
    """The number of the block that the prompt enters at, counted from 0 over all blocks; None: the last of those that
    are chosen. It stays to the last."""
    neighbours: Count = 20
    """Nearest tokens in the space of features, at most as many as there are."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all."""

    @property
    def identity_at_init(self) -> bool:
        """The prompt is attended from the start."""
        return False

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        chosen = self.chosen_blocks(backbone)
        number, stage = len(anatomy.stages) - 1, anatomy.stages[-1]
        first = chosen[-1][0] if self.prompt_layer is None else self.prompt_layer
        layers = {layer: block for layer, block in chosen if block in stage.blocks}
        if first not in layers:
            raise AnatomyError(
                f"{self.method}: prompt_layer={first} is not one of the chosen blocks of the last stage: "
                f"{', '.join(map(str, layers)) or 'none is chosen there'}"
            )
        check_takes_prompts(stage, self.method, "Use a method that adapts the layers, as LORA or SSF")
        plan = Blueprint()
        plan.shared["position"] = PromptPosition(stage.width)
        before = anatomy.blocks[first - 1] if layers[first] != stage.blocks[0] else None
        if before is not None:
            plan.parts.append((before.path, FeaturePart(stage, number)))
        elif stage.patch_tokens is None:
            raise AnatomyError(
                f"{self.method} makes the prompt for '{layers[first].path}' from the patch embedding, and where that "
                "is seen is not known: choose a later prompt_layer, or state Stage.patch_tokens in config.anatomy"
            )
        for layer, block in layers.items():
            if layer < first:
                continue
            generator = PromptGenerator(stage.width, self.neighbours) if layer == first else None
            pooled = block == anatomy.blocks[-1] and bool(backbone.pooled)
            part = InstancePrompt(stage, number, generator, from_patches=before is None, pooled=pooled)
            plan.parts.append((block.path, part))
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan
