"""The part of STAG at a block: tokens go to the side network ahead of it, and are displaced after it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from point_peft.anatomy.description import Stage
from point_peft.errors import AdapterError
from point_peft.parts.base import Call
from point_peft.parts.sequence import SequencePart
from point_peft.running.nested import Args, Kwargs
from point_peft.tuners.stag.side_network import GraphModule, SideNetwork, neighbours


class SidePart(SequencePart):
    """s <- s + D t ahead of a block; after it a step of the side tokens s, and their displacement, where it has one."""

    def __init__(
        self, stage: Stage, number: int, *, down: str, graph: str | None, neighbours: int, begins: bool, follows: bool
    ) -> None:
        super().__init__(stage, number)
        self.down = down
        self.graph = graph
        self.neighbours = neighbours
        self.begins = begins
        """True where the side tokens of the stage start."""
        self.follows = follows
        """True if what comes before it is known without the positions that the base adds: the block before has a part,
        or there is none."""

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        forward = call.forward
        # In a direct call of blocks it cannot be told when the next begins, but for the block where the side starts.
        fresh = self.begins and forward.inputs is None and not forward.recomputing
        side = None if fresh else forward.handover.take(self._key(call, "side"), call.path)
        if side is None and not self.begins:
            raise AdapterError(
                f"block '{call.path}' runs before the one whose side tokens it should be handed: call the model, or "
                "all of its blocks in order"
            )
        network = call.state(f"stage_{self.number}", SideNetwork)
        added = network.down[self.down](self._tokens(call, self.received(call, args, kwargs).patches, side is None))
        side = added if side is None else side + added
        if self.graph is None:
            forward.handover.leave(self._key(call, "side"), side)
        else:
            forward.handover.notes[call.adapter, "stag", call.path] = side
        return args, kwargs

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        tokens = self.returned(call, output)
        prefix, patches = tokens.prefix, tokens.patches
        if self.graph is not None:
            module = call.state(f"stage_{self.number}", SideNetwork).graph[self.graph]
            assert isinstance(module, GraphModule)
            near = neighbours(call.forward, self.number, self.neighbours)
            side, displaced = module(call.forward.handover.notes.pop((call.adapter, "stag", call.path)), near)
            call.forward.handover.leave(self._key(call, "side"), side)
            displaced = displaced.to(patches.dtype)
            prefix, patches = prefix + displaced.mean(dim=1, keepdim=True), patches + displaced
            output = self.without_prompts(output, prefix, patches)
        if self.stage.position == "every_block":
            call.forward.handover.leave(self._key(call, "tokens"), patches)
        return output

    def _tokens(self, call: Call, received: Tensor, first: bool) -> Tensor:
        """The patch tokens ahead of the block, without positions where the base has just added them."""
        tokens = None
        if self.follows and first:
            tokens = call.forward.seen.patches.get(self.number)
        elif self.follows and self.stage.position == "every_block":
            tokens = call.forward.handover.take(self._key(call, "tokens"), call.path)
        # What a stage gets need not be its patch embedding as it was: a model may mask tokens.
        return received if tokens is None or tokens.shape != received.shape else tokens

    def _key(self, call: Call, name: str) -> tuple[str, int, str]:
        return call.adapter, self.tuner, f"{name} of stage {self.number}"
