"""Graphs of points and their Fourier bases: the eigenvectors of normalised Laplacians."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from point_peft import geometry
from point_peft.running.forward import Forward

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
    points = forward.seen.coordinates[stage]

    def build() -> tuple[Graphs, Graphs]:
        # In double precision: two eigenvectors are told apart by the distance of their eigenvalues, which is small.
        with torch.no_grad(), torch.autocast(points.device.type, enabled=False):
            if stage in forward.seen.samples:
                order, counts = _packed_order(points, forward.seen.samples[stage])
                half = max(1, local_size // 2)
                return _make(points, order, counts, half), _make(points, order, counts, local_size)
            b, g, _ = points.shape
            order = rearrange(z_order(points) + g * torch.arange(b, device=points.device)[:, None], "b g -> (b g)")
            natural = torch.arange(b * g, device=points.device)
            counts, flat = torch.full_like(natural[:b], g), rearrange(points, "b g xyz -> (b g) xyz")
            size = -(-g // -(-g // local_size))  # of runs of nearly equal length
            return _make(flat, natural, counts, g, b), _make(flat, order, counts, size, b * -(-g // size))

    return forward.once(("point_gst", stage, local_size), build)


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
    vectors = fourier_basis(inside, real, smallest_distance(inside, real, sample, counts.shape[0]))
    return Graphs(vectors.to(torch.promote_types(points.dtype, torch.float32)), rows, places[:n])


# ---- the order of points ---------------------------------------------------------------------------------------------


def z_order(points: Tensor) -> Tensor:
    """The order (b, g) of points (b, g, 3) along the Z-order curve through cells of a hundredth: y, x, z by rank.

    As published, a coordinate counts by its low 16 bits, so that negative cells come after positive ones.
    """
    cell = (CELLS_PER_UNIT * points.detach().to(torch.promote_types(points.dtype, torch.float32))).trunc().long()
    bit = torch.arange(CELL_BITS, device=points.device)
    spread = ((cell[..., None] >> bit & 1) << 3 * bit).sum(dim=-1)
    x, y, z = spread.unbind(dim=-1)
    return (y << 2 | x << 1 | z).argsort(dim=-1, stable=True)


def _packed_order(points: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """The order (n,) of packed points (n, 3) along the curve, sample by sample, and how many each sample has."""
    order, ends = geometry.gathered(samples, len(points))
    along = z_order(points[order][None])[0]
    along = along[geometry.samples_of(ends, len(points))[along].argsort(stable=True)]
    return order[along], nn.functional.pad(ends, (1, 0)).diff()


# ---- eigenvectors ----------------------------------------------------------------------------------------------------


def smallest_distance(points: Tensor, real: Tensor, sample: Tensor, samples: int) -> Tensor:
    """delta (m,): the smallest distance that is not zero among the points (m, l, 3) of all graphs of a sample.

    `real` (m, l) says which are points, `sample` (m,) whose they are. Where all are at one place it is one.
    """
    distance = geometry.squared_distance(points, points).sqrt()
    counts = (distance > 0) & real[:, :, None] & real[:, None]
    smallest = distance.masked_fill(~counts, torch.inf).amin(dim=(1, 2))
    of_sample = smallest.new_full((samples,), torch.inf).scatter_reduce(0, sample, smallest, "amin")
    return of_sample.masked_fill(of_sample == torch.inf, 1.0)[sample]


def fourier_basis(points: Tensor, real: Tensor, delta: Tensor) -> Tensor:
    """Eigenvectors (m, l, l), in columns, of the Laplacians of graphs of points (m, l, 3); `real` (m, l) are some.

    They are a function of the points alone: the sign of an eigenvector, and the basis of the space of a repeated
    eigenvalue, are those that make the inner products with fixed functions of the points triangular and positive.
    """
    values, vectors = torch.linalg.eigh(laplacian(points, real, delta))
    column = torch.arange(values.shape[1], device=values.device)
    fresh = nn.functional.pad(values.diff(dim=1) > SAME_EIGENVALUE, (1, 0), value=True)
    first = torch.where(fresh, column, 0).cummax(dim=1).values
    projected = vectors.mT @ reference_functions(points, real)
    projected = projected.gather(2, repeat(column - first, "m l -> m k l", k=len(column)))
    # Spaces of other eigenvalues do not meet, so this is one small decomposition for each of them.
    rotation, triangle = torch.linalg.qr(projected.masked_fill(first[:, :, None] != first[:, None], 0.0))
    sign = torch.where(triangle.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(vectors.dtype)
    fixed: Tensor = vectors @ (rotation * sign[:, None])
    return fixed


def laplacian(points: Tensor, real: Tensor, delta: Tensor) -> Tensor:
    """I - D^-1/2 W D^-1/2 (m, l, l) for W_ij = delta / d_ij, and 1 for a point and itself or another at its place.

    Where there is no point, the row has 3 on the diagonal: an eigenvalue above all others.
    """
    distance = geometry.squared_distance(points, points).sqrt()
    both = real[:, :, None] & real[:, None]
    weight = (distance / delta[:, None, None]).clamp(min=1.0).reciprocal().masked_fill(~both, 0.0)
    scale = weight.sum(dim=2).clamp(min=1.0).rsqrt()
    return torch.diag_embed(torch.where(real, 1.0, 3.0).to(weight.dtype)) - weight * scale[:, :, None] * scale[:, None]


def reference_functions(points: Tensor, real: Tensor) -> Tensor:
    """l fixed functions, in columns (m, l, l), of where the points (m, l, 3) lie about their mean, in no symmetry.

    Only points at one place are also told apart by their order.
    """
    count = real.sum(dim=1)[:, None, None]
    centred = torch.where(real[..., None], points - points.sum(dim=1, keepdim=True) / count, 0.0)
    radius = (centred.square().sum(dim=(1, 2), keepdim=True) / count).sqrt()
    centred = centred / radius.masked_fill(radius == 0, 1.0)
    number = torch.arange(1, points.shape[1] + 1, dtype=points.dtype, device=points.device)
    order = 1 + (geometry.squared_distance(points, points) == 0).tril(-1).sum(dim=2)[..., None]
    # Multiples of irrational numbers spread evenly: wave vectors of up to 8 radians a radius along every axis.
    wave = 16 * ((number * number.new_tensor([2.0, 3.0, 5.0]).sqrt()[:, None]) % 1 - 0.5)
    return torch.cos(centred @ wave + order**2 * number * 7**0.5 + order * number**2 * 11**0.5)
