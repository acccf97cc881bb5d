"""The parts of PPT: prompt tokens of a second grouping, and the MLP beside that of every block."""

from __future__ import annotations

from torch import Tensor

from point_peft.anatomy.description import Stage
from point_peft.parts.base import Call
from point_peft.parts.second_grouping import (
    CarryingPart,
    GroupingPart,
    Init,
    TokenMlps,
    farthest_points,
    split_like,
    token_mlp,
)
from point_peft.parts.sequence import BlockTokens, noted_stream


class PromptGrouping(GroupingPart):
    """Every group of the second grouping is a prompt."""

    def __init__(self, stage: Stage, number: int, num_groups: int, group_size: int) -> None:
        super().__init__(stage, number)
        self.num_groups = num_groups
        self.group_size = group_size

    def make(self, call: Call, points: Tensor) -> tuple[Tensor, Tensor]:
        centres = farthest_points(points, self.num_groups)
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
        stream = noted_stream(call, self, tokens)
        joined = tokens.tokens
        change: Tensor = call.state("token_mlps", PositionMlps).all(stream)
        return split_like(joined + change.to(joined.dtype), tokens)
