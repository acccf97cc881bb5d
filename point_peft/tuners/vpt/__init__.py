"""VPT: learnable prompt tokens beside the patch tokens of a frozen transformer.

M. Jia, L. Tang, B.-C. Chen, C. Cardie, S. Belongie, B. Hariharan, S.-N. Lim: "Visual Prompt Tuning", ECCV 2022,
https://arxiv.org/abs/2203.12119

Prompts are tokens that attend and are attended like all others, but are parameters. With prefix tokens x, prompts p and
patch tokens t at block l:

    [x; _; t] <- block_l([x; E_l; t])       deep: each block has prompts of its own, what becomes of them is dropped
    [x; p; t] <- block_l([x; p; t])         shallow: p = E at the first block, and stays to the last

They lie between prefix and patch tokens, where a causal mask lets the patches attend to them. The backbone never sees
them between its blocks, so that positions and pooling are what they were. A backbone of several stages has prompts for
each.

When to use it: as the baseline for every other prompt method, and where the weights must not be touched and a few
thousand parameters must do. Deep prompts are the stronger ones; shallow ones cost 1/12 of the parameters.

Deviations from the code that is used for point clouds (the baseline in IDPT's repository), each with its reason:

- No second parameter for the position of a prompt: the prompt is only ever used in their sum.
- The prompts lie ahead of the patches and not behind them. Without a mask that is the same function; behind, a causal
  mask would keep every token from attending to them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from einops import repeat
from torch import Tensor, nn

from point_peft.anatomy.description import Stage
from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.sequence import LastingPrompts, SequencePart, check_takes_prompts, small_normal
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, Dropout


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

    identity_at_init = False  # prompts are attended from the start

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


class DeepPrompts(SequencePart):
    """Prompts that a block has to itself: they go in before it and are dropped after it."""

    prefix = "vpt"
    token_parameters = frozenset({"embeddings"})

    def __init__(self, stage: Stage, number: int, count: int, dropout: float, *, pooled: bool) -> None:
        super().__init__(stage, number)
        self.embeddings = small_normal(count, stage.width)
        self.dropout = nn.Dropout(dropout)
        self.pooled = pooled
        """True if a head of the adapter pools what becomes of the prompts in this block."""

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        each = repeat(self.dropout(self.embeddings), "p c -> b p c", b=self.coordinates(call).shape[0])
        return self.with_prompts(call, args, kwargs, each)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        count = self.embeddings.shape[0]
        got = self.returned(call, output, prompts=count)
        if self.pooled:
            call.forward.handover.leave(self.key(call, "prompts"), got.prompts, call.path)
        return self.without_prompts(output, got.prefix, got.patches, prompts=count)


class ShallowPrompts(LastingPrompts):
    """Prompts that stay from the first block to the last; only the part at the first one holds them."""

    prefix = "vpt"
    token_parameters = frozenset({"embeddings"})

    def __init__(self, stage: Stage, number: int, count: int, dropout: float, *, pooled: bool) -> None:
        super().__init__(stage, number, begins=count > 0, pooled=pooled)
        self.embeddings = small_normal(count, stage.width) if count else None
        self.dropout = nn.Dropout(dropout)

    def made(self, call: Call, args: Args, kwargs: Kwargs) -> Tensor:
        prompts: Tensor = self.dropout(self.embeddings)
        return repeat(prompts, "p c -> b p c", b=self.coordinates(call).shape[0])
