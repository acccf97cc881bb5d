"""The spatial adapter: a bottleneck around a convolution over the cells beside each token."""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from point_peft import geometry
from point_peft.running.forward import Forward

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
