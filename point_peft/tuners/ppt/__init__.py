"""PPT: the groups of a second grouping of the cloud are prompts, and three small MLPs, one for all blocks, tune tokens.

S. Zhang, Z. Qi, R. Dong, X. Bai, X. Wei: "Positional Prompt Tuning for Efficient 3D Representation Learning", 2024,
https://arxiv.org/abs/2408.11567.

The cloud is grouped a second time, and the groups pass through the backbone's own tokenizer and positional embedding,
which are trained in part. The prompts p that they become attend with the patch tokens t in every block and stay to the
end. M1, M2 and M3 are MLPs of two layers with a GELU, each the same for all blocks:

    p = tokenizer(groups),   q = pos(centres of the groups)
    t <- t + pos;   p <- p + q          (where the backbone adds positions before every block, else once)
    t <- t + M1(t);   p <- p + M2(p)
    x = [prefix; p; t];   x <- x + Attn(LN1 x);   x <- x + MLP(LN2 x) + M3(x)

Also trained are the positional embedding, the first layers of the tokenizer, and the prefix tokens with their
positions. The last layers of the M begin at zero; the prompts change the output of a fresh adapter all the same. The
backbone's own head reads its own tokens only. The published head reads the prompts too:
`heads.mlp_head(channels, classes, "cls+mean+prompt", activation=nn.GELU)`.

When to use it: for classification with a plain point transformer, where accuracy counts more than time: with as many
prompts as patches, a forward costs more than twice that of the backbone. A smaller `num_groups` makes it cheaper.

Deviations from the published code, each with its reason:
- the prompts lie between the prefix and the patch tokens, not after them: attention does not see the order, and heads
  that count patches from the end find them there.
- M1, M2 and M3 begin with nothing, so that training starts from the backbone and its prompts; `init="published"`
  begins their last layers as torch does.
- what M1 and M2 add is not written into slices of the tokens: that breaks autograd and compilation in places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from point_peft.anatomy.description import Stage
from point_peft.config import TunerConfig
from point_peft.parts import second_grouping
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.second_grouping import CarryingPart, GroupingPart, Init, TokenMlps, token_mlp
from point_peft.parts.sequence import BlockTokens, note_stream, noted_stream
from point_peft.schema import Count


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

    identity_at_init = False  # the prompts themselves change what the blocks make of the other tokens

    def build(self, backbone: Backbone) -> Blueprint:
        stage = second_grouping.stage_to_group(backbone, self.method)
        chosen = self.chosen_blocks(backbone)
        plan = Blueprint(modules=second_grouping.modules_to_tune(backbone, stage, self.tuned_modules))
        plan.shared["token_mlps"] = PositionMlps(stage.width, self.mlp_width, self.init)
        plan.parts.append((stage.tokenizer[-1], PromptGrouping(stage, 0, self.num_groups, self.group_size)))
        for _, block in chosen:
            plan.parts += [(block.path, PromptedBlock(stage, 0)), note_stream(block, self.method)]
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan


class PromptGrouping(GroupingPart):
    """Every group of the second grouping is a prompt."""

    def __init__(self, stage: Stage, number: int, num_groups: int, group_size: int) -> None:
        super().__init__(stage, number)
        self.num_groups = num_groups
        self.group_size = group_size

    def make(self, call: Call, points: Tensor) -> tuple[Tensor, Tensor]:
        centres = second_grouping.farthest_points(points, self.num_groups)
        return self.tokens(call.forward, points, centres, self.group_size), centres


class PositionMlps(TokenMlps):
    """M1 for the patch tokens, M2 for the prompts, M3 for all, the same for all blocks."""

    def __init__(self, channels: int, width: int, init: Init) -> None:
        super().__init__("ppt", channels, width, init)
        self.all = token_mlp(channels, width, channels, init)


class PromptedBlock(CarryingPart):
    """Prompts and patches with M1 and M2 go in; M3 of the stream after the attention is added to what comes out."""

    prefix = "ppt"

    def finish(self, call: Call, tokens: BlockTokens) -> BlockTokens:
        change: Tensor = call.state("token_mlps", PositionMlps).all(noted_stream(call, self, tokens))
        return BlockTokens.of(tokens.tokens + change.to(tokens.tokens.dtype), tokens.lengths)
