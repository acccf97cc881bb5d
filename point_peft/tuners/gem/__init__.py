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

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Stage
from point_peft.config import TunerConfig
from point_peft.errors import AdapterError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.sequence import SequencePart, check_located
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, at_least


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
    token_parameters = frozenset({"context.latents"})

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


# Tokens of packed scenes that attend together.
ROW = 1024


@dataclass(frozen=True)
class SceneRows:
    """Packed tokens of several scenes laid out in rows of one scene each, so that attention is batched."""

    index: Tensor
    """(rows, size) numbers of tokens; what fills a row up repeats its last."""
    real: Tensor
    """(rows, size) whether it is a token, or fills up."""
    scene: Tensor
    """(rows,) the scene of a row."""
    place: Tensor
    """(n,) where each token is in the rows."""
    scenes: int
    """The number of scenes."""


def scene_rows(forward: Forward, stage: int) -> SceneRows | None:
    """The packed tokens of a stage in rows, once per forward; None for dense tokens, which are."""
    if stage not in forward.seen.samples:
        return None
    samples, n = forward.seen.samples[stage], len(forward.seen.coordinates[stage])
    if n == 0:
        raise AdapterError("GEM looks at all tokens of a scene, and this batch holds none: pass one point or more")
    return forward.once(("gem rows", stage), lambda: _scene_rows(samples, n))


def _scene_rows(samples: Tensor, n: int) -> SceneRows:
    order, ends = geometry.gathered(samples, n)
    index, real, scene = geometry.rows_of(ends, n, ROW)
    index = order[index]
    place = torch.empty_like(order)
    place[index[real]] = real.flatten().nonzero()[:, 0]
    return SceneRows(index, real, scene, place, len(ends))


class CrossAttention(nn.Module):
    """softmax(Q a (K b)^T / sqrt(d)) V b of tokens a that look at tokens b, both (b, l, d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.query(a), self.key(b), self.value(b))

    def over_rows(self, a: Tensor, b: Tensor, rows: SceneRows) -> Tensor:
        """The same (scenes, m, d) of tokens a (m, d) that look at each scene's tokens, which are rows b."""
        k, v = self.key(b), self.value(b)
        scores = torch.einsum("md,rsd->rms", self.query(a), k).float() * a.shape[-1] ** -0.5
        scores = scores.masked_fill(~rows.real[:, None], -torch.inf)
        # The softmax does not depend on what is subtracted, so neither does its gradient.
        highest = scores.detach().amax(dim=2)
        where = rows.scene[:, None].expand_as(highest)
        limit = highest.new_zeros(rows.scenes, len(a)).scatter_reduce(0, where, highest, "amax", include_self=False)
        share = (scores - limit[rows.scene][:, :, None]).exp()
        # Shares of a large scene are too small for half precision; those of the highest are not.
        summed = torch.einsum("rms,rsd->rmd", share.to(v.dtype), v).float()
        total = share.new_zeros(rows.scenes, len(a)).index_add(0, rows.scene, share.sum(dim=2))
        mixed = summed.new_zeros(rows.scenes, *summed.shape[1:]).index_add(0, rows.scene, summed)
        # The highest has a share of one, so only a scene without tokens has less.
        mean: Tensor = (mixed / total.clamp(min=1.0)[:, :, None]).to(v.dtype)
        return mean


class ContextAdapter(nn.Module):
    """Tokens look at latents that have looked at all tokens of the scene, in `width` channels; zero at first."""

    def __init__(self, channels: int, width: int, latents: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width, bias=False)
        self.norm = nn.LayerNorm(width)
        # Of the size of the tokens: latents that begin alike would look at the same.
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.look = CrossAttention(width)
        self.read = CrossAttention(width)
        self.up = nn.Linear(width, channels, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, rows: SceneRows | None) -> Tensor:
        """The change of tokens (b, g, c), or packed (1, n, c) of the scenes in `rows`."""
        tokens = self.norm(self.down(x))
        if rows is None:
            latents = self.latents + self.look(self.latents.expand(x.shape[0], -1, -1), tokens)
            added: Tensor = self.up(self.read(tokens, latents))
            return added
        tokens = tokens[0][rows.index]
        latents = self.latents + self.look.over_rows(self.latents, tokens, rows)
        read = self.read(tokens, latents[rows.scene])
        added = self.up(read.flatten(0, 1)[rows.place])
        return added[None]


CELLS = 27
CENTRE = 13
# So many others lie beside a point of a plane on a grid, in whole cells along its axes.
BESIDE = 4
# In cells: how far off the points of a grid may be.
ON_GRID = 0.01


@dataclass(frozen=True)
class KernelCells:
    """The neighbours that the kernel meets around each of n tokens, each in a cell of the kernel."""

    index: Tensor
    """(n, k): 27 times the number of a neighbour, and its cell; or (pairs,), those inside the kernel alone."""
    weights: Tensor
    """In the same shape: one over the number of neighbours in that cell; zero outside the kernel."""
    begin: Tensor | None = None
    """(n,) where the pairs of each token begin, if only those inside are kept."""


class SpatialAdapter(nn.Module):
    """GELU(sum_o W_o mean_j (W_down x_j)) W_up, from c channels to `width` and back; zero at first."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, width, bias=False)
        self.kernel = nn.Parameter(torch.empty(CELLS, width, width))
        self.up = nn.Linear(width, channels, bias=False)
        bound = (CELLS * width) ** -0.5  # as torch begins a convolution
        nn.init.uniform_(self.kernel, -bound, bound)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, cells: KernelCells) -> Tensor:
        """The change of tokens (n, c)."""
        # What a token gives to each cell that it can lie in is taken once, whoever it is a neighbour of.
        given = nn.functional.linear(self.down(x), rearrange(self.kernel, "o i r -> (o r) i"))
        given = rearrange(given, "n (o r) -> (n o) r", o=CELLS)
        weights = cells.weights.to(given.dtype)
        summed = nn.functional.embedding_bag(
            cells.index, given, offsets=cells.begin, mode="sum", per_sample_weights=weights
        )
        added: Tensor = self.up(nn.functional.gelu(summed))
        return added


def kernel_cells(forward: Forward, stage: int, k: int) -> KernelCells:
    """The kernel's cells around the patch tokens of a stage, of all samples in a row; once per forward."""
    points = forward.seen.coordinates[stage]
    # A decoder's stage is back on the points of the encoder's.
    owner = next(number for number, other in forward.seen.coordinates.items() if other is points)
    return forward.once(("gem cells", owner, k), lambda: _kernel_cells(points, forward.seen.samples.get(stage), k))


def _kernel_cells(points: Tensor, samples: Tensor | None, k: int) -> KernelCells:
    """Of the k nearest to each of the points (b, g, 3), or packed (n, 3) in `samples`."""
    # Autocast would take differences in half precision.
    with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        if samples is None:
            b, g, _ = points.shape
            first = torch.arange(b, device=points.device) * g
            near = geometry.knn(points, points, min(k, g)) + first[:, None, None]
            near, points = rearrange(near, "b g k -> (b g) k"), rearrange(points, "b g xyz -> (b g) xyz")
            samples = repeat(torch.arange(b, device=points.device), "b -> (b g)", g=g)
            return _in_cells(points, near, torch.ones_like(near, dtype=torch.bool), samples, first + g)
        order, ends = geometry.gathered(samples, len(points))
        points = points[order]
        near = geometry.ragged_knn(points, ends, points, ends, k)
        # Where a sample has fewer points, its nearest is repeated.
        real = near != near[:, :1]
        real[:, 0] = True
        cells = _in_cells(points, near, real, geometry.samples_of(ends, len(points)), ends)
        place = order.argsort()
        number, cell = cells.index // CELLS, cells.index % CELLS
        index, weights = (order[number] * CELLS + cell)[place], cells.weights[place]
        # Only the pairs inside the kernel, which in a scene are a third. How many these are is not a static size.
        inside = weights > 0
        begin = nn.functional.pad(inside.sum(dim=1).cumsum(0), (1, 0))[:-1]
        return KernelCells(index[inside], weights[inside], begin)


def _in_cells(points: Tensor, near: Tensor, real: Tensor, samples: Tensor, ends: Tensor) -> KernelCells:
    """Of points (n, 3) and those near each, by number (n, k): which are `real`, and which sample each belongs to."""
    step = points[near] - points[:, None]
    far = step.abs().amax(dim=2)
    side = _spacing(step, far, samples, ends)[samples]
    inside = real & (far <= 1.5 * side[:, None])
    x, y, z = (step / side[:, None, None]).clamp(-1, 1).round().long().unbind(2)
    cell = 9 * x + 3 * y + z + CENTRE
    # What is not inside is counted apart.
    cell = torch.where(inside, cell, CELLS)
    count = far.new_zeros(points.shape[0], CELLS + 1).scatter_add_(1, cell, torch.ones_like(far))
    weights = inside / count.gather(1, cell)
    return KernelCells(near * CELLS + torch.where(inside, cell, CENTRE), weights)


def _spacing(step: Tensor, far: Tensor, samples: Tensor, ends: Tensor) -> Tensor:
    """The side of a cell (b,) in each sample, from the steps (n, k, 3) to those near each point, and how far they are.

    That of the grid, if the points are on one where most have a neighbour; else how far the fourth neighbour is.
    """
    away = far.masked_fill(far == 0, torch.inf).topk(min(BESIDE, far.shape[1]), dim=1, largest=False).values
    away = away.masked_fill(away.isinf(), 0.0)
    first, fourth = (_median(value, samples, ends) for value in (away[:, 0], away.amax(dim=1)))
    cells = step / first[samples, None, None]
    off = (cells - cells.round()).abs().amax(dim=(1, 2))
    off = torch.zeros_like(first).scatter_reduce(0, samples, off, "amax")
    return torch.where(off < ON_GRID, first, fourth)


def _median(values: Tensor, samples: Tensor, ends: Tensor) -> Tensor:
    """The median (b,) of those values (n,) of each sample that are above zero; one, where none is."""
    # Sample by sample, the largest first.
    order = values.argsort(descending=True, stable=True)
    order = order[samples[order].argsort(stable=True)]
    count = torch.zeros_like(ends).index_add_(0, samples, (values > 0).long())
    middle = nn.functional.pad(ends, (1, 0))[:-1] + count // 2
    return torch.where(count > 0, values[order[middle.clamp(max=values.shape[0] - 1)]], 1.0)
