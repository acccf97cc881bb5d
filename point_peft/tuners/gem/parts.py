"""The part of GEM: both adapters ahead of a block."""

from __future__ import annotations

from einops import rearrange

from point_peft.anatomy.description import Stage
from point_peft.parts.base import Call
from point_peft.parts.sequence import SequencePart
from point_peft.running.nested import Args, Kwargs
from point_peft.tuners.gem.context_adapter import ContextAdapter, scene_rows
from point_peft.tuners.gem.spatial_adapter import SpatialAdapter, kernel_cells


class GEMPart(SequencePart):
    """x <- x + spatial(x), then x <- x + context(x), for the patch tokens ahead of a block."""

    prefix = "gem"

    def __init__(
        self, stage: Stage, number: int, spatial: SpatialAdapter, context: ContextAdapter, neighbours: int
    ) -> None:
        super().__init__(stage, number)
        self.spatial = spatial
        self.context = context
        self.neighbours = neighbours

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        got = self.received(call, args, kwargs)
        x = got.patches
        cells = kernel_cells(call.forward, self.number, self.neighbours)
        spatial = self.spatial(rearrange(x, "b g c -> (b g) c"), cells)
        x = x + rearrange(spatial, "(b g) c -> b g c", b=x.shape[0], g=x.shape[1]).to(x.dtype)
        x = x + self.context(x, scene_rows(call.forward, self.number)).to(x.dtype)
        return self.with_tokens(args, kwargs, got.prefix, x)
