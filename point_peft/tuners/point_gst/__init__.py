"""PointGST: an adapter beside the MLP that works on the spectrum of the tokens on graphs of where they lie.

D. Liang, T. Feng, X. Zhou, Y. Zhang, Z. Zou, X. Bai: "Parameter-Efficient Fine-Tuning in Spectral Domain for Point
Cloud Learning", TPAMI 2025, https://arxiv.org/abs/2410.08114

The patch tokens of a sample are the nodes of a complete graph, and so are those of each group of 32 that follow one
another on a Z-order curve. The nearer two tokens lie, the heavier the edge between them. The eigenvectors U of a
graph's Laplacian take the place of sine waves: U^T h are the frequencies of features h on the graph. With tokens x
after the attention, at coordinates c, and r channels in the middle:

    W_ij = delta / |c_i - c_j|,  W_ii = 1       delta: the smallest distance in the sample that is not zero
    I - D^-1/2 W D^-1/2 = U diag(lambda) U^T    once per forward; D: the row sums of W
    h = W_down x                                c -> r
    a(z) = z + SiLU(W_a LN(z))                  at every frequency; W_a is the same for both scales, LN is not
    s = sum over scales of U a(U^T h)           patch tokens only
    y <- y + W_up (SiLU(h) + s)                 y: the tokens after the block

W_up and W_a start at zero: a fresh adapter is the backbone. Prefix tokens and their positions are trained too.

What the bases depend on: the coordinates of the sample and nothing else, neither batch mates nor the library that finds
eigenvectors. The sign of an eigenvector and the basis of a repeated eigenvalue (closer than 1e-6) are fixed by inner
products with fixed waves through the cloud; tokens at one place are told apart by their order. Other coordinates give
other bases: a change of 1e-7 moves an eigenvector by about that over the distance to the next eigenvalue, and may turn
the sign of one that is nearly orthogonal to the wave. No rule without such points exists.

When to use it: for classification and part segmentation with up to some hundred tokens a cloud, and for scenes, where
there should be neither prompts nor other clouds. On a CPU the bases of 128 tokens cost less than one block; their cost
grows with the cube of the number of tokens, and GPUs are slow at many small ones. In packed tokens graphs are small and
their cost grows with the number of tokens: a training step on 100,000 points of a PTv3-like encoder of 48 and 96
channels takes about 1.2 times the processor time of LoRA's.

Deviations from the published code, each with its reason:

- U^T h and then U, the graph Fourier transform. The published code has them exchanged, which its authors say is a
  mistake; `transform="published"` does as it did.
- delta is that of the sample. Published, it is that of the batch, so that a sample's output depended on its batch
  mates; and distances are exact, not expanded, whose rounding gave delta there.
- Tokens at one place have the weight of one and the same. Published, their weight is infinite.
- Signs and bases of repeated eigenvalues are fixed. Published, they are what the machine's library gives.
- A number of tokens that the size of the groups does not divide is cut into groups of nearly equal size.
- Packed tokens (PTv3 and the like) are too many for one graph: their two scales are groups of 32 and of 16.
- Where the prediction is made from the prefix tokens alone, the last block's adapter has no spectral branch: nothing
  would read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Stage
from point_peft.config import TunerConfig
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Call
from point_peft.parts.prefix import tune_prefix
from point_peft.parts.sequence import SequencePart, check_located, note_stream, noted_stream
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs
from point_peft.schema import Count, at_least

Transform = Literal["fourier", "published"]
# Eigenvalues, all in 0 .. 2, that are no farther apart count as one that is repeated.
SAME_EIGENVALUE = 1e-6
# What coordinates are multiplied by and how many bits of them count in the Z-order, as published.
CELLS_PER_UNIT = 100
CELL_BITS = 16


@dataclass(frozen=True)
class Graphs:
    """Graphs of at most l tokens each that together hold the n tokens of all samples, and their Fourier bases."""

    vectors: Tensor
    """(m, l, l): eigenvectors in columns, by ascending eigenvalue."""
    rows: Tensor
    """(m, l): which tokens a graph holds; n where it holds fewer than l."""
    places: Tensor
    """(n,): where each token is among the (m l) of `rows`."""

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens (n, c) by graph, (m, l, c), with zeros where a graph holds fewer than l."""
        filled = nn.functional.pad(tokens, (0, 0, 0, 1)).index_select(0, self.rows.flatten())
        return rearrange(filled, "(m l) c -> m l c", l=self.rows.shape[1])

    def join(self, tokens: Tensor) -> Tensor:
        """Undo `split`: its result in the order of the tokens again."""
        return rearrange(tokens, "m l c -> (m l) c").index_select(0, self.places)


def graphs_of(forward: Forward, stage: int, local_size: int) -> tuple[Graphs, Graphs]:
    """The graphs of a stage at both scales, once per forward: all tokens of a sample, and groups of near ones.

    Packed samples may have too many tokens for one graph; they get groups of half the size instead.
    """
    points, samples = forward.seen.coordinates[stage], forward.seen.samples.get(stage)

    def build() -> tuple[Graphs, Graphs]:
        # In double precision: two eigenvectors are told apart by the distance of their eigenvalues, which is small.
        with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
            if samples is not None:
                order, counts = _packed_order(points, samples)
                half = max(1, local_size // 2)
                return _make(points, order, counts, half), _make(points, order, counts, local_size)
            b, g, _ = points.shape
            order = rearrange(z_order(points) + g * torch.arange(b, device=points.device)[:, None], "b g -> (b g)")
            natural = torch.arange(b * g, device=points.device)
            counts, flat = torch.full_like(natural[:b], g), rearrange(points, "b g xyz -> (b g) xyz")
            size = -(-g // -(-g // local_size))  # of runs of nearly equal length
            return _make(flat, natural, counts, g, b), _make(flat, order, counts, size, b * -(-g // size))

    # A decoder's stage has the very tensors of the encoder's whose tokens it gets back to.
    same = next(
        one
        for one, known in forward.seen.coordinates.items()
        if known is points and forward.seen.samples.get(one) is samples
    )
    return forward.once(("point_gst", same, local_size), build)


def _make(points: Tensor, order: Tensor, counts: Tensor, size: int, graphs: int | None = None) -> Graphs:
    """Graphs of at most `size` of the points (n, 3), which `order` lists sample by sample, `counts` (b,) in each.

    A sample is cut into as few runs as can be, of nearly equal length. `graphs` is their number, if that is known.
    """
    n = points.shape[0]
    runs = (counts + size - 1) // size
    sample = torch.repeat_interleave(runs, output_size=graphs)
    number = torch.arange(sample.shape[0], device=points.device) - (runs.cumsum(0) - runs)[sample]
    first, count = (counts.cumsum(0) - counts)[sample], counts[sample]
    begin, end = (first + step * count // runs[sample] for step in (number, number + 1))
    place = begin[:, None] + torch.arange(size, device=points.device)
    real = place < end[:, None]
    rows = torch.where(real, order[place.clamp(max=n - 1)], n)
    places = rows.new_empty(n + 1).scatter_(0, rows.flatten(), torch.arange(rows.numel(), device=points.device))
    # A point that is nowhere (NaN) would make the decomposition fail for the whole batch.
    placed = points.detach().double().nan_to_num(0.0, 0.0, 0.0)
    inside = torch.where(real[..., None], placed[rows.clamp(max=n - 1)], 0.0)
    vectors = fourier_basis(inside, real, sample, counts.shape[0], pick=graphs is None)
    return Graphs(vectors.to(torch.promote_types(points.dtype, torch.float32)), rows, places[:n])


# ---- the order of points ---------------------------------------------------------------------------------------------


def z_order(points: Tensor) -> Tensor:
    """The order (b, g) of points (b, g, 3) along the Z-order curve through cells of a hundredth: y, x, z by rank.

    As published, a coordinate counts by its low 16 bits, so that negative cells come after positive ones.
    """
    cell = (CELLS_PER_UNIT * points.detach().to(torch.promote_types(points.dtype, torch.float32))).trunc().long()
    x, y, z = (cell & (1 << CELL_BITS) - 1).unbind(dim=-1)
    return geometry.interleaved(torch.stack([y, x, z], dim=-1)).argsort(dim=-1, stable=True)


def _packed_order(points: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """The order (n,) of packed points (n, 3) along the curve, sample by sample, and how many each sample has."""
    order, ends = geometry.gathered(samples, len(points))
    along = z_order(points[order][None])[0]
    along = along[geometry.samples_of(ends, len(points))[along].argsort(stable=True)]
    return order[along], geometry.counts_of(ends)


# ---- eigenvectors ----------------------------------------------------------------------------------------------------


def fourier_basis(points: Tensor, real: Tensor, sample: Tensor, samples: int, *, pick: bool = False) -> Tensor:
    """Eigenvectors (m, l, l), in columns, of the Laplacians of graphs of points (m, l, 3); `real` (m, l) are some.

    They are a function of the points alone: the sign of an eigenvector, and the basis of the space of a repeated
    eigenvalue, are those that make the inner products with fixed functions of the points triangular and positive.
    `sample` (m,) says whose graph each is. To `pick` the graphs with a repeated eigenvalue, which are few of many small
    ones, saves most of that; it waits for the device.
    """
    distance = distances(points, real)
    values, vectors = torch.linalg.eigh(laplacian(distance, real, smallest_distance(distance, sample, samples)))
    fresh = nn.functional.pad(values.diff(dim=1) > SAME_EIGENVALUE, (1, 0), value=True)
    if not pick:
        return _fixed(vectors, fresh, points, real, distance)
    # A space of one eigenvector is measured by the first function.
    along = vectors.mT @ reference_functions(points, real, distance, 1)
    signed: Tensor = vectors * torch.where(along < 0, -1.0, 1.0).mT
    some = (~fresh).any(dim=1).nonzero()[:, 0]
    signed[some] = _fixed(vectors[some], fresh[some], points[some], real[some], distance[some])
    return signed


def _fixed(vectors: Tensor, fresh: Tensor, points: Tensor, real: Tensor, distance: Tensor) -> Tensor:
    """The eigenvectors (m, l, l) with signs and bases by rule; at `fresh` (m, l) ones, another eigenvalue begins."""
    column = torch.arange(vectors.shape[1], device=vectors.device)
    first = torch.where(fresh, column, 0).cummax(dim=1).values
    projected = vectors.mT @ reference_functions(points, real, distance, len(column))
    projected = projected.gather(2, repeat(column - first, "m l -> m k l", k=len(column)))
    # Spaces of other eigenvalues do not meet, so this is one small decomposition for each of them.
    rotation, triangle = torch.linalg.qr(projected.masked_fill(first[:, :, None] != first[:, None], 0.0))
    sign = torch.where(triangle.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(vectors.dtype)
    fixed: Tensor = vectors @ (rotation * sign[:, None])
    return fixed


def distances(points: Tensor, real: Tensor) -> Tensor:
    """Distances (m, l, l) of the points (m, l, 3) of graphs; infinite to what is not `real` (m, l)."""
    both = real[:, :, None] & real[:, None]
    return geometry.squared_distance(points, points).sqrt().masked_fill(~both, torch.inf)


def smallest_distance(distance: Tensor, sample: Tensor, samples: int) -> Tensor:
    """delta (m,): the smallest distance (m, l, l) that is not zero in all graphs of a sample, whose are `sample` (m,).

    Where all points are at one place it is one.
    """
    smallest = distance.masked_fill(distance == 0, torch.inf).amin(dim=(1, 2))
    of_sample = smallest.new_full((samples,), torch.inf).scatter_reduce(0, sample, smallest, "amin")
    return of_sample.masked_fill(of_sample == torch.inf, 1.0)[sample]


def laplacian(distance: Tensor, real: Tensor, delta: Tensor) -> Tensor:
    """I - D^-1/2 W D^-1/2 (m, l, l) for W_ij = delta / d_ij, and 1 for a point and itself or another at its place.

    Where there is no point, the row has 3 on the diagonal: an eigenvalue above all others.
    """
    delta = delta[:, None, None]
    weight = delta / torch.maximum(distance, delta)
    scale = weight.sum(dim=2).clamp(min=1.0).rsqrt()
    return torch.diag_embed(torch.where(real, 1.0, 3.0).to(weight.dtype)) - weight * scale[:, :, None] * scale[:, None]


def reference_functions(points: Tensor, real: Tensor, distance: Tensor, number: int) -> Tensor:
    """The first fixed functions, in columns (m, l, number), of where the points (m, l, 3) lie about their mean.

    They have no symmetry. Only points at one place, of no distance (m, l, l), are also told apart by their order.
    """
    count = real.sum(dim=1)[:, None, None]
    centred = torch.where(real[..., None], points - points.sum(dim=1, keepdim=True) / count, 0.0)
    radius = (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt()
    centred = centred / radius.masked_fill(radius == 0, 1.0)
    index = torch.arange(1, number + 1, dtype=points.dtype, device=points.device)
    order = 1 + (distance == 0).tril(-1).sum(dim=2)[..., None]
    # Multiples of irrational numbers spread evenly: wave vectors of up to 8 radians a radius along every axis.
    wave = 16 * ((index * index.new_tensor([2.0, 3.0, 5.0]).sqrt()[:, None]) % 1 - 0.5)
    return torch.cos(centred @ wave + order**2 * index * 7**0.5 + order * index**2 * 11**0.5)


@dataclass(frozen=True, kw_only=True)
class PointGSTConfig(TunerConfig):
    """PointGST; `target_modules` and the like choose among the transformer blocks, None means all."""

    method: ClassVar[str] = "POINT_GST"

    rank: Count = 36
    """The channels r that are transformed."""
    local_size: Annotated[int, at_least(2)] = 32
    """Tokens in a local graph, at most."""
    transform: Transform = "fourier"
    """U a(U^T h), or with U and U^T exchanged, as published."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all."""

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        plan = Blueprint()
        for index, stage, blocks in self.chosen_stages(backbone):
            check_located(stage, self.method, blocks[0].path)
            for block in blocks:
                # Where the prediction is made from the prefix tokens alone, nothing reads the last block's patches.
                scales = 2 if anatomy.patches_read or block != anatomy.blocks[-1] else 0
                adapter = SpectralAdapter(stage.width, self.rank, self.transform, scales=scales)
                plan.parts.append((block.path, SpectralPart(stage, index, adapter, self.local_size)))
                plan.parts.append(note_stream(block, self.method))
        tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan


class SpectralAdapter(nn.Module):
    """W_up (SiLU(h) + sum over scales of U a(U^T h)), h = W_down x, a(z) = z + SiLU(W_a LN(z)); W_a for all scales."""

    def __init__(self, channels: int, rank: int, transform: Transform, *, scales: int) -> None:
        super().__init__()
        self.published = transform == "published"
        self.down = nn.Linear(channels, rank)
        self.up = nn.Linear(rank, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.norms = nn.ModuleList(nn.LayerNorm(rank) for _ in range(scales))
        self.mix = nn.Linear(rank, rank) if scales else None
        if self.mix is not None:
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)

    def forward(self, ahead: Tensor, patches: Tensor, scales: Sequence[Graphs]) -> Tensor:
        """The change (b, e + g, c) of tokens ahead (b, e, c) and patch tokens (b, g, c) with these graphs."""
        low = self.down(torch.cat([ahead, patches], dim=1))
        narrow, own = nn.functional.silu(low), low[:, ahead.shape[1] :]
        rows = rearrange(own, "b g r -> (b g) r")
        spectral = [self._adapt(rows, graphs, norm) for graphs, norm in zip(scales, self.norms, strict=True)]
        if spectral:
            mixed = rearrange(torch.stack(spectral).sum(dim=0), "(b g) r -> b g r", b=patches.shape[0])
            narrow = narrow + nn.functional.pad(mixed, (0, 0, ahead.shape[1], 0)).to(narrow.dtype)
        change: Tensor = self.up(narrow)
        return change

    def _adapt(self, tokens: Tensor, graphs: Graphs, norm: nn.Module) -> Tensor:
        """U a(U^T h) for tokens h (n, r); as published, U^T a(U h)."""
        assert self.mix is not None
        basis = graphs.vectors.to(tokens.dtype)
        basis = basis.mT if self.published else basis
        spectrum = basis.mT @ graphs.split(tokens)
        spectrum = spectrum + nn.functional.silu(self.mix(norm(spectrum)))
        return graphs.join(basis @ spectrum.to(basis.dtype))


class SpectralPart(SequencePart):
    """Adds to a block's output what the adapter makes of its tokens after the attention."""

    prefix = "point_gst"

    def __init__(self, stage: Stage, number: int, adapter: SpectralAdapter, local_size: int) -> None:
        super().__init__(stage, number)
        self.adapter = adapter
        self.local_size = local_size

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        got = self.returned(call, output)
        stream = noted_stream(call, self, got)
        ahead = got.prefix.shape[1]
        scales = graphs_of(call.forward, self.number, self.local_size) if len(self.adapter.norms) else ()
        change = self.adapter(stream[:, :ahead], stream[:, ahead:], scales).to(got.patches.dtype)
        return self.without_prompts(output, got.prefix + change[:, :ahead], got.patches + change[:, ahead:])
