"""The configuration of PointLoRA: ranks, groupings, and what of the backbone is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from point_peft.anatomy.description import Block, Stage
from point_peft.anatomy.structure import weight_to_adapt
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.second_grouping import CarryingPart, Init, TokenMlps, modules_to_tune, stage_to_group, token_mlp
from point_peft.schema import Count, Factor, at_least
from point_peft.tuners.point_lora.low_rank import LowRankPart, SharedMlps
from point_peft.tuners.point_lora.selection import SelectedTokens, Selection


@dataclass(frozen=True, kw_only=True)
class PointLoRAConfig(TunerConfig):
    """PointLoRA on the blocks of a backbone with one stage; `target_modules` names blocks, None means all.

    `r` and `lora_alpha` are of the low-rank updates, `shared_mlp_width` and `shared_mlp_scale` of the MLPs m beside
    them; a width of 0 leaves m out, as an attention needs whose layers are not called (`nn.MultiheadAttention`).

    `num_groups`, `group_size`, `num_selected` and `mask_loss_weights` have one entry a grouping: its size, how many of
    its tokens are selected, and the weight of its entropy in `auxiliary_loss`; clouds of fewer points are taken as
    they are. `token_mlp_width` is the hidden width of M1 and M2. `init="identity"` lets m, M1 and M2 begin with
    nothing; "published" begins all their layers as torch does. `tuned_modules` are trained whole, None: the positional
    embedding and the first layers of the tokenizer. `tuned_tokens` names prefix tokens and positions, None: all.
    """

    method: ClassVar[str] = "POINT_LORA"

    r: Count = 8
    lora_alpha: Factor = 8
    shared_mlp_width: Annotated[int, at_least(0)] = 32
    shared_mlp_scale: float = 1.0
    token_mlp_width: Count = 32
    num_groups: Sequence[int] = (128, 64)
    group_size: Sequence[int] = (32, 64)
    num_selected: Sequence[int] = (32, 8)
    mask_loss_weights: Sequence[float] = (0.004, 0.001)
    init: Init = "identity"
    tuned_modules: str | Sequence[str] | None = None
    tuned_tokens: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = min(self.num_groups, default=0)
        require(sizes >= 1, self, "num_groups", "one number or more, each 1 or more")
        count = len(self.num_groups)
        for name in ("group_size", "num_selected"):
            values = getattr(self, name)
            fits = len(values) == count and min(values) >= 1
            require(fits, self, name, f"{count} numbers, as num_groups has, each 1 or more")
        weights = self.mask_loss_weights
        fits = len(weights) == count and min(weights) >= 0
        require(fits, self, "mask_loss_weights", f"{count} numbers, as num_groups has, each 0 or more")

    @property
    def identity_at_init(self) -> bool:
        """The selected tokens change what the blocks make of the others."""
        return False

    def build(self, backbone: Backbone) -> Blueprint:
        stage = stage_to_group(backbone, self.method)
        chosen = self.chosen_blocks(backbone)
        plan = Blueprint(modules=modules_to_tune(backbone, stage, self.tuned_modules))
        plan.shared["token_mlps"] = TokenMlps("point_lora", stage.width, self.token_mlp_width, self.init)
        plan.parts.append((stage.tokenizer[-1], SelectedTokens(stage, 0, self._selections())))
        for _, block in chosen:
            plan.parts.append((block.path, CarryingPart(stage, 0)))
        self._build_low_rank(plan, backbone, stage, [block for _, block in chosen])
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan

    def _selections(self) -> list[Selection]:
        columns = zip(self.num_groups, self.group_size, self.num_selected, self.mask_loss_weights, strict=True)
        return [Selection(*row) for row in columns]

    def _build_low_rank(self, plan: Blueprint, backbone: Backbone, stage: Stage, blocks: Sequence[Block]) -> None:
        mlps: dict[str, nn.Sequential] = {}
        for block in blocks:
            for path in self._attention_layers(block):
                weight, shape = _adapted(path, backbone.modules[path])
                name = path.removeprefix(block.path + ".").replace(".", "_") if self.shared_mlp_width else None
                part = LowRankPart(weight, shape, self.r, self.lora_alpha / self.r, name, self.shared_mlp_scale)
                if weight != "weight":
                    part.act_by_weight(path)
                if name is not None and name not in mlps:
                    mlps[name] = token_mlp(shape[1], self.shared_mlp_width, shape[0], self.init)
                plan.parts.append((path, part))
        if mlps:
            plan.shared["shared_mlps"] = SharedMlps(mlps)

    def _attention_layers(self, block: Block) -> list[str]:
        """The layers that make query, key and value of a block, and the projection of its attention."""
        if block.projection is None:
            raise AnatomyError(
                f"{self.method} adapts the projection of every attention, and that of '{block.attention}' was not "
                "found: name it in config.anatomy, or use LORA"
            )
        return [*(block.qkv or (block.attention,)), block.projection]


def _adapted(path: str, module: nn.Module) -> tuple[str, tuple[int, int]]:
    """The name of the weight that is adapted, and its shape (out, in)."""
    weight = weight_to_adapt(module)
    if weight is None:
        raise AnatomyError(
            f"'{path}' is a {type(module).__name__}; {PointLoRAConfig.method} adapts linear layers and the fused "
            "projection of nn.MultiheadAttention: use LORA with target_modules"
        )
    return weight
