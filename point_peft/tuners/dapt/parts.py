"""The parts of DAPT: scaling and shifting, the dynamic adapter beside the MLP, and the prompts that it gives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Block, Stage
from point_peft.errors import AdapterError
from point_peft.parts.base import Call
from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.scale_shift import LayerScaleShift, PatchScaleShift
from point_peft.parts.sequence import EntrancePart, LastingPrompts, SequencePart
from point_peft.running.nested import Args, Kwargs, put_argument
from point_peft.running.tokens import batch_first, block_tokens, output_tokens


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


def adapted_key(call: Call, tuner: int, block: str) -> tuple[str, int, str]:
    """Where a block's adapter leaves what its prompt is made of."""
    return call.adapter, tuner, f"adapted tokens of {block}"


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
            call.forward.handover.leave(adapted_key(call, self.tuner, self.block), mean)
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
        adapted = call.forward.handover.take(adapted_key(call, self.tuner, call.path), call.path)
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
        kept = call.forward.handover.take(self._key(call), call.path)
        tokens = block_tokens(self.stage, call.path, args, kwargs)
        if kept is None or kept.shape != tokens.shape:
            raise AdapterError(
                f"position=\"once\" gives block '{call.path}' what the block before it returned, which was "
                f"{'nothing' if kept is None else tuple(kept.shape)} where {tuple(tokens.shape)} is needed: call the "
                "model, or all of its blocks in order, and do not combine it with prompts of other methods"
            )
        return put_argument(args, kwargs, self.stage.tokens, kept)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        call.forward.handover.leave(self._key(call), output_tokens(self.stage, call.path, output))
        return output

    def _key(self, call: Call) -> tuple[str, int, str]:
        return call.adapter, self.tuner, f"tokens of stage {self.number}"
