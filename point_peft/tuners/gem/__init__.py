"""GEM: a sparse convolution among neighbouring tokens and a few latent tokens for the whole scene, ahead of each block.

L. Tang, Z. Chen, D. Tao: "On Geometry-Enhanced Parameter-Efficient Fine-Tuning for 3D Scene Segmentation",
NeurIPS 2025, https://arxiv.org/abs/2505.22444

At every block, with patch tokens x at coordinates p, the cell of neighbour j of i in a 3 x 3 x 3 kernel
o(i, j) = round(clamp((p_j - p_i) / h, -1, 1)), and learned latent tokens L (m, d) of the block:

    x_i <- x_i + GELU(sum_o W_o mean_j (W_down x_j)) W_up           j in cell o, within 1.5 h; c -> r -> c
    u   =  LN(V_down x)                                             c -> d
    l   =  L + softmax(Q L (K u)^T / sqrt(d)) V u                   over all tokens of the scene
    x   <- x + V_up softmax(Q' u (K' l)^T / sqrt(d)) V' l           over the m latents; d -> c

The first line is the spatial adapter, the others are the context adapter. Both up-projections start at zero, so a fresh
adapter changes nothing. Where the coordinates are those of a grid, with at most one token in a cell, the first sum is a
submanifold sparse convolution. With the default widths it is 1.6 % of the parameters of Point Transformer V3 (46 M).

When to use it: for scenes on hierarchical backbones with local attention, such as Point Transformer V3 and Sonata,
where the context adapter lets distant tokens know of each other. On single objects, whose tokens all attend to each
other anyway, BOTTLENECK or LORA cost less time.

Deviations from the published code, each with its reason:

- The spatial adapter's cells are found by coordinates, not on the grid of a convolution, so that it works on every
  backbone with known coordinates. If the tokens of a sample are on a grid where most have a neighbour, h is its side;
  else h is the median of how far the fourth neighbour is away (in the maximum norm), so that on a surface about nine
  tokens lie in the kernel, as on a grid.
- Several tokens in one cell count as their mean, as where points were averaged into voxels: how dense they lie does
  not matter. Only the 27 nearest are looked at (`neighbours`), which on a grid are all.
- Both adapters act on the input of a block, whatever it is made of. Pointcept's blocks take their positional encoding
  of a copy of the features, so that there x + pos(x) + spatial(x) is the published sum. Elsewhere the encoding sees
  what was added, too, or is part of x.
- The context adapter is known here by its description alone, and no outputs of the published code to compare with
  were at hand: it has the plainest form, one head, with latents and projections of each block's own.
- Prefix tokens (CLS and the like) have no place in space and do not change; they attend to the patches in the block.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from einops import rearrange

from point_peft.anatomy.description import Stage
from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.sequence import SequencePart, check_located
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, at_least
from point_peft.tuners.gem.context_adapter import ContextAdapter, scene_rows
from point_peft.tuners.gem.spatial_adapter import SpatialAdapter, kernel_cells


@dataclass(frozen=True, kw_only=True)
class GEMConfig(TunerConfig):
    """GEM; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "GEM"

    spatial_width: Count = 16
    """The channels r of the sparse convolution."""
    context_width: Count = 36
    """The channels d of the latent tokens and their attention."""
    # Of one alone, neither a softmax over latents nor a neighbourhood depends on anything.
    num_latents: Annotated[int, at_least(2)] = 8
    """The latent tokens m of a block."""
    neighbours: Annotated[int, at_least(2)] = 27
    """The nearest tokens that can lie in the kernel, itself among them; at most as many as there are."""

    def build(self, backbone: Backbone) -> Blueprint:
        plan = Blueprint()
        for number, stage, blocks in self.chosen_stages(backbone):
            check_located(stage, self.method, blocks[0].path)
            for block in blocks:
                plan.parts.append((block.path, GEMPart(stage, number, self)))
        return plan


class GEMPart(SequencePart):
    """x <- x + spatial(x), then x <- x + context(x), for the patch tokens ahead of a block."""

    prefix = "gem"

    def __init__(self, stage: Stage, number: int, config: GEMConfig) -> None:
        super().__init__(stage, number)
        self.spatial = SpatialAdapter(stage.width, config.spatial_width)
        self.context = ContextAdapter(stage.width, config.context_width, config.num_latents)
        self.neighbours = config.neighbours

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        got = self.received(call, args, kwargs)
        x = got.patches
        cells = kernel_cells(call.forward, self.number, self.neighbours)
        spatial = self.spatial(rearrange(x, "b g c -> (b g) c"), cells)
        x = x + rearrange(spatial, "(b g) c -> b g c", b=x.shape[0], g=x.shape[1]).to(x.dtype)
        x = x + self.context(x, scene_rows(call.forward, self.number)).to(x.dtype)
        return self.with_tokens(args, kwargs, got.prefix, x)
