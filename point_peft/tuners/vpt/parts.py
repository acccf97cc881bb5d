"""The parts of VPT: prompts at a block."""

from __future__ import annotations

from typing import Any

from einops import repeat
from torch import Tensor, nn

from point_peft.anatomy.description import Stage
from point_peft.parts.base import Call
from point_peft.parts.sequence import LastingPrompts, SequencePart, small_normal
from point_peft.running.nested import Args, Kwargs


class DeepPrompts(SequencePart):
    """Prompts that a block has to itself: they go in before it and are dropped after it."""

    prefix = "vpt"

    def __init__(self, stage: Stage, number: int, count: int, dropout: float, *, pooled: bool) -> None:
        super().__init__(stage, number)
        self.embeddings = small_normal(count, stage.width)
        self.dropout = nn.Dropout(dropout)
        self.pooled = pooled
        """True if a head of the adapter pools what becomes of the prompts in this block."""

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        prompts: Tensor = self.dropout(self.embeddings)
        each = repeat(prompts, "p c -> b p c", b=self.coordinates(call).shape[0])
        return self.with_prompts(call, args, kwargs, each)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        count = self.embeddings.shape[0]
        got = self.returned(call, output, prompts=count)
        if self.pooled:
            call.forward.handover.leave((call.adapter, self.tuner, "prompts"), got.prompts)
        return self.without_prompts(output, got.prefix, got.patches, prompts=count)


class ShallowPrompts(LastingPrompts):
    """Prompts that stay from the first block to the last; only the part at the first one holds them."""

    prefix = "vpt"

    def __init__(self, stage: Stage, number: int, count: int, dropout: float, *, pooled: bool) -> None:
        super().__init__(stage, number, begins=count > 0, pooled=pooled)
        self.embeddings = small_normal(count, stage.width) if count else None
        self.dropout = nn.Dropout(dropout)

    def made(self, call: Call, args: Args, kwargs: Kwargs) -> Tensor:
        prompts: Tensor = self.dropout(self.embeddings)
        return repeat(prompts, "p c -> b p c", b=self.coordinates(call).shape[0])
