"""The parts of bottleneck adapters: after a module, beside one, and where what the MLP gets is seen."""

from __future__ import annotations

from typing import Any

from point_peft import tokens as token_ops
from point_peft.tokens import Args, Kwargs
from point_peft.tuners.base import Bottleneck, Call, Part


class SerialPart(Part):
    """h <- h + scale * A(h), on the output h of a module, or the first of its outputs."""

    prefix = "bottleneck"

    def __init__(self, adapter: Bottleneck, scale: float) -> None:
        super().__init__()
        self.adapter = adapter
        self.scale = scale

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        steps = (0,) if isinstance(output, tuple) else ()
        h = token_ops.fetch(output, steps)
        return token_ops.put(output, steps, h + self.scale * self.adapter(h).to(h.dtype))


class NotePart(Part):
    """Notes what the MLP of a block gets, for a part further on in the same call of the block."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block = block

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        call.forward.notes["bottleneck", call.adapter, self.block] = (*args, *kwargs.values())[0]
        return args, kwargs


class ParallelPart(Part):
    """h <- h + scale * A(u), with u what the MLP gets: this module, unless a part noted it for the block."""

    prefix = "bottleneck"

    def __init__(self, adapter: Bottleneck, scale: float, noted: str | None) -> None:
        super().__init__()
        self.adapter = adapter
        self.scale = scale
        self.noted = noted
        """The block whose MLP ends here, where something was noted."""

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if self.noted is None:
            u = (*args, *kwargs.values())[0]
        else:
            u = call.forward.notes.pop(("bottleneck", call.adapter, self.noted))
        return output + self.scale * self.adapter(u).to(output.dtype)
