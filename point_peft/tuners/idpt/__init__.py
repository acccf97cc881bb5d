"""IDPT: one prompt for each cloud, generated from its own features.

Y. Zha, J. Wang, T. Dai, B. Chen, Z. Wang, S.-T. Xia: "Instance-aware Dynamic Prompt Tuning for Pre-trained Point Cloud
Models", ICCV 2023, https://arxiv.org/abs/2304.07221

A fixed prompt is the same for every cloud, whatever noise or missing parts this one has. Here a small graph network
reads the patch tokens y as they are ahead of block l (before positions are added) and makes the prompt of that cloud:

    E_i(y)_a = max over b in kNN(y_a) of LeakyReLU(BN(W_i [y_b - y_a ; y_a]))      neighbours in the space of features
    y1 = E_1(y), y2 = E_2(y1), y3 = E_3(y2)
    p  = max over tokens of LeakyReLU(BN(W_4 [y1 ; y2 ; y3]))
    [x; p + pos; t] goes into block l, and p stays in the sequence to the last block

By default l is the last block.

When to use it: where clouds differ much from each other, as in scans with background and occlusion, and 1.3 M
parameters are not too many: it is the largest of the prompt methods. The published head reads the prompt too:
`heads={"cls_head_finetune": "cls+prompt+max"}`.

Deviations from the published code, each with its reason:

- The position of the prompt is trained, as the paper means it. The published rule for what is trained misses it, so
  that it stays random. These are the c parameters that ours has more.
- What is not trained has no gradient. The published code leaves it on everywhere, which costs memory, and counts the
  frozen gradients in the gradient's norm.
- The generator's BatchNorm keeps its statistics in the adapter; the backbone's do not move.
- With the backbone's own head the prompt acts through attention alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from einops import reduce
from torch import Tensor

from point_peft.anatomy.description import Stage
from point_peft.config import TunerConfig
from point_peft.errors import AdapterError, AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call, SharedState
from point_peft.parts.feature_graph import EdgeNetwork
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.sequence import LastingPrompts, SequencePart, check_takes_prompts, small_normal
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, Limit


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

    identity_at_init = False  # the prompt is attended from the start

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


class PromptPosition(SharedState):
    """The position (c,) of the prompt, one for all blocks."""

    prefix = "idpt.position"
    token_parameters = frozenset({"position"})

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.position = small_normal(channels)

    def file_name(self, name: str) -> str:
        return self.prefix


class FeaturePart(SequencePart):
    """At the block before the prompt's first: hands on the patch tokens that it returns."""

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        call.forward.handover.leave(self.key(call, "features"), self.returned(call, output).patches, call.path)
        return output


class PromptGenerator(EdgeNetwork):
    """Three edge convolutions, a linear layer on all they give, and the maximum over tokens: (b, g, c) to (b, c)."""

    def __init__(self, channels: int, neighbours: int) -> None:
        super().__init__(channels, (channels,) * 3, channels, neighbours)

    def forward(self, tokens: Tensor, *, recomputing: bool) -> Tensor:
        prompt: Tensor = reduce(super().forward(tokens, recomputing=recomputing), "b g c -> b c", "max")
        return prompt


class InstancePrompt(LastingPrompts):
    """The prompt of a cloud; the part at its first block generates it."""

    prefix = "idpt"

    def __init__(
        self, stage: Stage, number: int, generator: PromptGenerator | None, *, from_patches: bool, pooled: bool
    ) -> None:
        super().__init__(stage, number, begins=generator is not None, pooled=pooled)
        self.generator = generator
        self.from_patches = from_patches
        """True if the features are the patch embedding, and not what a block before has returned."""

    def made(self, call: Call, args: Args, kwargs: Kwargs) -> Tensor:
        features = self._features(call)
        assert self.generator is not None
        prompt: Tensor = self.generator(features, recomputing=call.forward.recomputing)[:, None]
        return prompt + self._position(call, prompt) if self.stage.position == "once" else prompt

    def entering(self, call: Call, prompts: Tensor) -> Tensor:
        return prompts + self._position(call, prompts) if self.stage.position == "every_block" else prompts

    def _position(self, call: Call, like: Tensor) -> Tensor:
        return call.state("position", PromptPosition).position.to(like.dtype)

    def _features(self, call: Call) -> Tensor:
        if self.from_patches:
            return call.forward.seen.patches[self.number]
        handed = call.forward.handover.take(self.key(call, "features"), call.path)
        if handed is None:
            raise AdapterError(
                f"block '{call.path}' runs without the block before it, from whose tokens the prompt is made: call the "
                "model, or all of its blocks in order"
            )
        return handed
