"""PointLoRA: low-rank updates of the attention with shared MLPs beside them, and selected tokens of further groupings.

S. Wang, X. Liu, L. Kong, J. Xu, C. Hu, G. Fang, W. Li, J. Zhu, X. Wang: "PointLoRA: Low-Rank Adaptation with Token
Selection for Point Cloud Learning", CVPR 2025, https://arxiv.org/abs/2504.16023.

The query, key and value projection and the output projection of every attention get a low-rank update, and beside it
an MLP m of two layers with a GELU, which all blocks share. The cloud is grouped twice more, finely and coarsely, and
passes through the backbone's own tokenizer. A small predictor scores the tokens u, and the best of each grouping stay
in the sequence through all blocks as further tokens f. M1 and M2 are MLPs like m, the same for all blocks:

    y = W x + (alpha / r) B A x + s m(x)
    p = sigmoid(W2 ReLU(W1 u));   f = the u of highest p, times p / p.detach()
    t <- t + pos;   f <- f + pos(centres of f)      (where the backbone adds positions before every block, else once)
    t <- t + M1(t);   f <- f + M2(f);   [prefix; f; t] pass through the block
    auxiliary loss: for each grouping, its weight times the mean of p log p + (1 - p) log(1 - p)

Also trained are the positional embedding, the first layers of the tokenizer, and the prefix tokens with their
positions. B and the last layers of m, M1 and M2 begin at zero; the selected tokens change the output of a fresh adapter
all the same. The backbone's own head reads its own tokens only; the published head reads the selected ones too:
`heads.mlp_head(channels, classes, "cls+all_max")`. Add `model.auxiliary_loss()` to the training loss. Because of m and
the tokens, nothing can be merged.

When to use it: for classification with a plain point transformer when LoRA alone is not enough and the two further
groupings, which about double the cost of a forward, can be paid. What remains without m and the tokens is LORA, which
merges.

Deviations from the published code, each with its reason:
- the selected tokens are multiplied by p / p.detach(), which is one: the published predictor gets no gradient from the
  task, and its entropy loss alone pushes every p to 1/2. Ours learns which tokens help.
- alpha / r is applied; as published it is never used, which is the same at the published r = alpha = 8.
- the selected tokens lie between the prefix and the patch tokens, not after them: attention does not see the order,
  and heads that count patches from the end find them there.
- m, M1 and M2 begin with nothing, so that training starts from the backbone and its tokens; `init="published"` begins
  their last layers as torch does.
- only the positions of selected tokens are computed: no other is used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Block, Stage
from point_peft.anatomy.structure import weight_to_adapt
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, Part, SharedState
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.second_grouping import (
    CarryingPart,
    GroupingPart,
    Init,
    TokenMlps,
    farthest_points,
    modules_to_tune,
    stage_to_group,
    token_mlp,
)
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, Factor, at_least


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
        require(min(self.num_groups, default=0) >= 1, self, "num_groups", "one number or more, each 1 or more")
        count = len(self.num_groups)
        for name, least in (("group_size", 1), ("num_selected", 1), ("mask_loss_weights", 0)):
            values = getattr(self, name)
            fits = len(values) == count and min(values) >= least
            require(fits, self, name, f"{count} numbers, as num_groups has, each {least} or more")

    identity_at_init = False  # the selected tokens change what the blocks make of the others

    def build(self, backbone: Backbone) -> Blueprint:
        stage = stage_to_group(backbone, self.method)
        chosen = self.chosen_blocks(backbone)
        plan = Blueprint(modules=modules_to_tune(backbone, stage, self.tuned_modules))
        plan.shared["token_mlps"] = TokenMlps("point_lora", stage.width, self.token_mlp_width, self.init)
        columns = zip(self.num_groups, self.group_size, self.num_selected, self.mask_loss_weights, strict=True)
        plan.parts.append((stage.tokenizer[-1], SelectedTokens(stage, 0, [Selection(*row) for row in columns])))
        for _, block in chosen:
            plan.parts.append((block.path, CarryingPart(stage, 0)))
        self._build_low_rank(plan, backbone, stage, [block for _, block in chosen])
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan

    def _build_low_rank(self, plan: Blueprint, backbone: Backbone, stage: Stage, blocks: Sequence[Block]) -> None:
        mlps: dict[str, nn.Sequential] = {}
        for block in blocks:
            for path in self._attention_layers(block):
                module = backbone.modules[path]
                adapted = weight_to_adapt(module)
                if adapted is None:
                    raise AnatomyError(
                        f"'{path}' is a {type(module).__name__}; {self.method} adapts linear layers and the fused "
                        "projection of nn.MultiheadAttention: use LORA with target_modules"
                    )
                weight, shape = adapted
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
        if block.projection is None or block.attention is None:
            raise AnatomyError(
                f"{self.method} adapts the projection of every attention, and that of '{block.attention}' was not "
                "found: name it in config.anatomy, or use LORA"
            )
        return [*(block.qkv or (block.attention,)), block.projection]


class SharedMlps(SharedState):
    """m for each of the adapted layers of a block, the same for all blocks."""

    prefix = "point_lora"

    def __init__(self, mlps: Mapping[str, nn.Sequential]) -> None:
        super().__init__()
        self.shared_mlps = nn.ModuleDict(mlps)


class LowRankPart(Part):
    """y <- y + scale * B A x + s * m(x), where m is the shared MLP of that name; without a name, W <- W + scale * B A.

    Only without m is it a change of the weight.
    """

    prefix = "point_lora"

    def __init__(
        self, weight: str, shape: tuple[int, int], r: int, scale: float, shared: str | None, shared_scale: float
    ) -> None:
        super().__init__()
        outputs, inputs = shape
        self.weight = weight
        self.scale = scale
        self.shared = shared
        self.shared_scale = shared_scale
        self.mergeable = shared is None
        self.lora_A = nn.Linear(inputs, r, bias=False)
        self.lora_B = nn.Linear(r, outputs, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        update = self.scale * self.lora_B(self.lora_A(x))
        if self.shared is not None:
            mlp = call.state("shared_mlps", SharedMlps).shared_mlps[self.shared]
            update = update + self.shared_scale * mlp(x)
        return output + update.to(output.dtype)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        weight: Tensor = getattr(module, self.weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = self.scale * self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        return {self.weight: (weight.to(wide) + update).to(weight.dtype)}

    def act_by_weight(self, path: str) -> None:
        if not self.mergeable:
            raise AnatomyError(
                f"'{path}' is not called as a layer, its weights are read, so the shared MLP beside it has no input: "
                "set shared_mlp_width=0 to do without, or use LORA"
            )
        super().act_by_weight(path)


@dataclass(frozen=True)
class Selection:
    """One grouping, of whose tokens the best `num_selected` are taken."""

    num_groups: int
    group_size: int
    num_selected: int
    loss_weight: float


class MaskPredictor(nn.Module):
    """Scores (b, g) of the tokens (b, g, c), whose sigmoid is a mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // 2)
        self.fc2 = nn.Linear(channels // 2, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.fc2(nn.functional.relu(self.fc1(tokens)))
        return scores[:, :, 0]


class SelectedTokens(GroupingPart):
    """The tokens of highest score of every grouping, best first."""

    prefix = "point_lora"

    def __init__(self, stage: Stage, number: int, selections: Sequence[Selection]) -> None:
        super().__init__(stage, number)
        self.selections = tuple(selections)
        self.mask_predictor = MaskPredictor(stage.width)

    def make(self, call: Call, points: Tensor) -> tuple[Tensor, Tensor]:
        # The first of many farthest points are the farthest of fewer.
        farthest = farthest_points(points, max(one.num_groups for one in self.selections))
        tokens, centres, losses = [], [], []
        for one in self.selections:
            middles = farthest[:, : one.num_groups]
            grouped = self.tokens(call.forward, points, middles, one.group_size)
            scores = self.mask_predictor(grouped.to(self.mask_predictor.fc1.weight.dtype))
            chosen = scores.topk(min(one.num_selected, scores.shape[1]), dim=1).indices
            kept = geometry.gather(grouped, chosen)
            tokens.append(kept * straight_through(scores.gather(1, chosen))[:, :, None].to(kept.dtype))
            centres.append(geometry.gather(middles, chosen))
            losses.append(one.loss_weight * negative_entropy(scores))
        if self.training:
            call.forward.add_loss(torch.stack(losses).sum())
        return torch.cat(tokens, dim=1), torch.cat(centres, dim=1)


def straight_through(scores: Tensor) -> Tensor:
    """p / p.detach() for p = sigmoid(scores): one, with the gradient of log p, however small p is."""
    log_p = nn.functional.logsigmoid(scores)
    return (log_p - log_p.detach()).exp()


def negative_entropy(scores: Tensor) -> Tensor:
    """The mean of p log p + (1 - p) log(1 - p) over all scores, p = sigmoid(score)."""
    p = scores.sigmoid()
    return (p * nn.functional.logsigmoid(scores) + (1 - p) * nn.functional.logsigmoid(-scores)).mean()
