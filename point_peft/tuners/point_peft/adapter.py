"""The adapter A after a block's MLP."""

from typing import Any

from point_peft.parts.base import Call, Narrow, Part
from point_peft.parts.bottleneck import Bottleneck, add_adapted
from point_peft.running.nested import Args, Kwargs


class MlpPart(Part):
    """h <- h + scale * A(h), on the output h of a block's MLP."""

    prefix = "point_peft"

    def __init__(self, adapter: Bottleneck, scale: float) -> None:
        super().__init__()
        self.adapter = adapter
        self.scale = scale

    @property
    def narrow(self) -> Narrow:
        return Narrow(self.adapter.down, self.adapter.up)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return add_adapted(output, self.adapter, self.scale)
