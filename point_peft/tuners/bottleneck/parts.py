"""The parts of bottleneck adapters: after a module, and beside the MLP."""

from __future__ import annotations

from typing import Any

from point_peft.anatomy.description import Block
from point_peft.parts.base import Call, Part
from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.sequence import EntrancePart
from point_peft.running.nested import Args, Kwargs, fetch, put


class SerialPart(Part):
    """h <- h + scale * A(h), on the output h of a module, or the first of its outputs."""

    prefix = "bottleneck"

    def __init__(self, adapter: Bottleneck, scale: float) -> None:
        super().__init__()
        self.adapter = adapter
        self.scale = scale

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        steps = (0,) if isinstance(output, tuple) else ()
        h = fetch(output, steps)
        return put(output, steps, h + self.scale * self.adapter(h).to(h.dtype))


class ParallelPart(EntrancePart):
    """h <- h + scale * A(u), with u what the MLP gets."""

    prefix = "bottleneck"

    def __init__(self, adapter: Bottleneck, scale: float, block: Block) -> None:
        super().__init__(block)
        self.adapter = adapter
        self.scale = scale

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return output + self.scale * self.adapter(self.entrance(call, args, kwargs)).to(output.dtype)
