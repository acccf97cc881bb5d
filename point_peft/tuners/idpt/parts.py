"""The parts of IDPT: one that hands on features, one that puts the prompt in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from point_peft.anatomy.description import Stage
from point_peft.errors import AdapterError
from point_peft.parts.base import Call, SharedState
from point_peft.parts.sequence import LastingPrompts, SequencePart, small_normal
from point_peft.running.nested import Args, Kwargs
from point_peft.tuners.idpt.generator import PromptGenerator


class PromptPosition(SharedState):
    """The position (c,) of the prompt, one for all blocks."""

    prefix = "idpt.position"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.position = small_normal(channels)

    def file_name(self, name: str) -> str:
        return self.prefix


class FeaturePart(SequencePart):
    """At the block before the prompt's first: hands on the patch tokens that it returns."""

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        call.forward.handover.leave((call.adapter, self.tuner, "features"), self.returned(call, output).patches)
        return output


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
        handed = call.forward.handover.take((call.adapter, self.tuner, "features"), call.path)
        if handed is None:
            raise AdapterError(
                f"block '{call.path}' runs without the block before it, from whose tokens the prompt is made: call the "
                "model, or all of its blocks in order"
            )
        return handed
