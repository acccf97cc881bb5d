"""DAPT: an adapter with a scale for every token beside the MLP, whose outputs become prompts of the blocks after it.

X. Zhou, D. Liang, W. Xu, X. Zhu, Y. Xu, Z. Zou, X. Bai: "Dynamic Adapter Meets Prompt Tuning: Parameter-Efficient
Transfer Learning for Point Cloud Analysis", CVPR 2024, https://arxiv.org/abs/2403.01439

Every feature of the backbone is scaled and shifted channel by channel: the patch tokens, what norms and linear layers
of the blocks give, the prompts, and what the final norm gives. Prefix tokens are trained. In block l, with u what the
MLP gets and x all tokens of the sequence:

    TFTS(z) = gamma * z + beta                                          one value a channel each
    d(u)    = relu(w_s LN(u) + b_s) * (W_up dropout(GELU(W_down LN(u) + b_down)) + b_up)        c -> r -> c, r = 64
    x       <- x + MLP(u) + d(u)
    p_l     = TFTS(mean of GELU(d(u)) over all tokens)
    P_l     = [p_l; P_(l-1)]                                            goes in after the prefix, ahead of the patches

The sequence so has one token more after every block. The published head pools [cls; mean of P; max of patches]:
`heads={"cls_head_finetune": "cls+prompt+max"}`.

When to use it: where the points that matter differ from cloud to cloud, as in real scans with background, and a few
more parameters (0.7 M on Point-MAE) do not hurt. Its authors say that results depend on the dropout.

Deviations from the published code, each with its reason:

- Positions are added as the backbone was trained with them. The published code adds them ahead of the first block only,
  to a Point-MAE that was trained with them ahead of every block: `position="once"`.
- `init="identity"` (the default) starts gamma at one and beta at zero, not near them (normal, 0.02): a fresh adapter is
  the backbone plus its prompts. In both the up-projection starts at zero.
- The scale of every token starts at one, its weight at zero. From a random start it can be zero for all tokens, and
  then relu lets no gradient through to the adapter.
- The base's own head is the default. What the last block would make a prompt of, nothing reads then, so it makes none:
  768 parameters less on Point-MAE than the 721,932 that were published without the head.
- Between two blocks the base has its own tokens only; the prompts are handed on beside them and get no positions.
- Stages of different tokens have prompts of their own. Packed tokens have no place for prompts: the adapters and TFTS
  remain with `internal_prompts=False`.
- A layer that makes keys alone gets no beta, nor one without a bias of which another module reads the weight: it would
  have no effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy, Block, Stage
from point_peft.config import TunerConfig
from point_peft.errors import AdapterError
from point_peft.parts import scale_shift
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, Part
from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.scale_shift import LayerScaleShift, PatchScaleShift, block_sites, channels_of, patch_taps
from point_peft.parts.sequence import EntrancePart, LastingPrompts, SequencePart, at_mlp, check_takes_prompts, mlp_of
from point_peft.running.nested import Args, Kwargs, put_argument
from point_peft.running.tokens import batch_first, block_tokens, output_tokens
from point_peft.schema import Count, Dropout

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
        for _, part in plan.parts if self.init == "published" else ():
            if isinstance(part, (LayerTFTS, PatchTFTS, InternalPrompts)):
                for tensor, mean in ((part.gamma, 1.0), (part.beta, 0.0)):
                    if tensor is not None:
                        nn.init.normal_(tensor, mean, 0.02)
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
        inside = [path for block in blocks for path in block_sites(block)]
        scalable = [p for p in (*inside, *anatomy.final_norms) if channels_of(backbone.modules[p]) is not None]
        paths = dict.fromkeys([*patch_taps(anatomy), *scalable])
        return scale_shift.scale_shift_parts(backbone, DAPTConfig.method, paths, LayerTFTS, PatchTFTS)


class LayerTFTS(LayerScaleShift):
    """TFTS on what a norm or a linear layer gives."""

    prefix = "dapt"


class PatchTFTS(PatchScaleShift):
    """TFTS on the patch tokens."""

    prefix = "dapt"


class DynamicAdapter(nn.Module):
    """d(u) = relu(w_s LN(u) + b_s) * A(LN(u)): each token has a scale of its own."""

    def __init__(self, channels: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.scale = nn.Linear(channels, 1)
        self.bottleneck = Bottleneck(channels, width, dropout, nn.GELU())
        # Were the scale of all tokens zero, which a relu may give, nothing of the adapter would be trained.
        nn.init.zeros_(self.scale.weight)
        nn.init.ones_(self.scale.bias)
        nn.init.kaiming_uniform_(self.bottleneck.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.bottleneck.down.bias)
        self.bottleneck.zero_up()

    def forward(self, u: Tensor) -> Tensor:
        normed = self.norm(u)
        adapted: Tensor = self.scale(normed).relu() * self.bottleneck(normed)
        return adapted


class AdapterPart(EntrancePart):
    """h <- h + d(u) on the output h of a block's MLP, with u what the MLP gets."""

    prefix = "dapt"

    def __init__(self, adapter: DynamicAdapter, block: Block, *, prompted: Stage | None) -> None:
        super().__init__(block)
        self.adapter = adapter
        self.prompted = prompted
        """The stage, if the block makes a prompt of what the adapter gives."""

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        adapted = self.adapter(self.entrance(call, args, kwargs))
        if self.prompted is not None:
            mean = nn.functional.gelu(batch_first(adapted, self.prompted.layout)).mean(dim=1, keepdim=True)
            # Left and not noted: a model that checkpoints the inside of its blocks may run it without gradient.
            call.forward.handover.leave(self.key(call, f"adapted tokens of {self.block}"), mean, call.path)
        return output + adapted.to(output.dtype)


class InternalPrompts(LastingPrompts):
    """The prompts of the blocks before go in ahead of a block; after it comes one more, TFTS(mean GELU(d(u)))."""

    prefix = "dapt"

    def __init__(self, stage: Stage, number: int, *, begins: bool, makes: bool, pooled: bool) -> None:
        super().__init__(stage, number, begins=begins, pooled=pooled)
        self.gamma = nn.Parameter(torch.ones(stage.width)) if makes else None
        self.beta = nn.Parameter(torch.zeros(stage.width)) if makes else None

    def made(self, call: Call, args: Args, kwargs: Kwargs) -> Tensor:
        patches = self.received(call, args, kwargs).patches
        return patches.new_empty(patches.shape[0], 0, patches.shape[2])

    def leaving(self, call: Call, prompts: Tensor) -> Tensor:
        if self.gamma is None or self.beta is None:
            return prompts
        adapted = call.forward.handover.take(self.key(call, f"adapted tokens of {call.path}"), call.path)
        assert adapted is not None  # the block's MLP has just run
        new = adapted * self.gamma + self.beta
        return torch.cat([new.to(prompts.dtype), prompts], dim=1)


class PositionOnce(SequencePart):
    """Gives a block what the block before returned, instead of that with the positions that the base adds again."""

    def __init__(self, stage: Stage, number: int, *, first: bool) -> None:
        super().__init__(stage, number)
        self.first = first

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.first:
            return args, kwargs
        kept = call.forward.handover.take(self.key(call, f"tokens of stage {self.number}"), call.path)
        tokens = block_tokens(self.stage, call.path, args, kwargs)
        if kept is None or kept.shape != tokens.shape:
            raise AdapterError(
                f"position=\"once\" gives block '{call.path}' what the block before it returned, which was "
                f"{'nothing' if kept is None else tuple(kept.shape)} where {tuple(tokens.shape)} is needed: call the "
                "model, or all of its blocks in order, and do not combine it with prompts of other methods"
            )
        return put_argument(args, kwargs, self.stage.tokens, kept)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        tokens = output_tokens(self.stage, call.path, output)
        call.forward.handover.leave(self.key(call, f"tokens of stage {self.number}"), tokens, call.path)
        return output
