"""Functions on packed point clouds: the points of all samples one after another, with the end of each sample.

Scenes differ in size by orders of magnitude, so nothing here is padded to the largest sample: memory grows with the
number of points. `offset` (b,) holds where each sample ends: cumulative counts, the last is n; an empty sample repeats
the end before it. A sample's result depends on its own points alone, bit for bit, relative to where it starts.
"""

import torch
from torch import Tensor, nn

from point_peft.errors import PointPeftError
from point_peft.geometry import search
from point_peft.geometry.neighbours import farthest_point_sample
from point_peft.geometry.offsets import checked_offset, counts_of, runs_of, samples_of
from point_peft.geometry.search import packed_points


def ragged_knn(queries: Tensor, query_offset: Tensor, points: Tensor, offset: Tensor, k: int) -> Tensor:
    """Indices (m, k) of the `k` points (n, 3) nearest to each query (m, 3) in its own sample, nearest first.

    Exact; which of equally far points is taken depends on the sample alone. Where a sample has fewer than `k` points,
    its nearest point is repeated for those that are missing, so that no result depends on the size of other samples.
    No gradient. Raises if a sample has queries but no points, or a coordinate is not finite.

    Queries and points are cut into blocks of near ones. A block of queries goes down the boxes around the points and
    keeps those that can hold a neighbour, then looks at every point of the leaves it is left with.
    """
    queries, points = packed_points(queries, "queries"), packed_points(points, "points")
    query_offset = checked_offset(query_offset, len(queries), "query_offset")
    offset = checked_offset(offset, len(points), "offset")
    if len(query_offset) != len(offset):
        raise PointPeftError(f"queries and points differ in batch size: {len(query_offset)} and {len(offset)}")
    if k < 1:
        raise PointPeftError(f"ragged_knn: cannot choose {k} points")
    lacking = (counts_of(query_offset) > 0) & (counts_of(offset) == 0)
    if bool(lacking.any()):
        raise PointPeftError(f"ragged_knn: sample {int(lacking.nonzero()[0])} has queries but no points")
    if len(queries) == 0:
        return torch.empty(0, k, dtype=torch.int64, device=points.device)
    with torch.no_grad():
        # A leaf holds at least half its size, unless it is all of its sample: at least k points.
        size = 2 * max(8, 1 << (k - 1).bit_length())
        tree = search.build_tree(points, offset, size)
        together = min(size, search.QUERIES)
        same = queries is points and together == size and torch.equal(query_offset, offset)
        blocks = tree if same else search.build_tree(queries, query_offset, together)
        index = torch.empty(len(queries), k, dtype=torch.int64, device=points.device)
        step = max(1, search.PAIRS // int(torch.bincount(tree.sample).max()))
        for begin in range(0, len(blocks.count), step):
            part = torch.arange(begin, min(begin + step, len(blocks.count)), device=points.device)
            owner, leaf = search.near_leaves(blocks, part, tree)
            owner, leaf = search.needed_leaves(blocks, owner, leaf, tree, k)
            for block, table in search.leaf_tables(owner, leaf, together * size, 0, len(tree.count)):
                nearest = search.nearest_in_leaves(blocks.inside[:, block], table, tree, k)
                real = torch.arange(together, device=points.device) < blocks.count[block, None]
                index[blocks.index[block][real]] = nearest[real]
        own = counts_of(offset)[samples_of(query_offset, len(queries))]
        missing = torch.arange(k, device=points.device) >= own[:, None]
        return torch.where(missing, index[:, :1], index)


def ragged_farthest_point_sample(
    points: Tensor, offset: Tensor, ratio: float, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """Indices (s,) of a share `ratio` of the points (n, 3) of each sample, spread far apart, and their offset (b,).

    Of n_i points `max(1, round(ratio * n_i))` are chosen, those of `geometry.farthest_point_sample` and in its order,
    as long as a sample has at most `block` points. The cost of that grows with n_i squared, so a larger sample is cut
    along a Z-order curve into blocks of nearly equal size, and each block is sampled like a cloud of its own. No
    gradient. Raises on a ratio outside 0 .. 1.
    """
    points = packed_points(points, "points")
    offset = checked_offset(offset, len(points), "offset")
    if not 0 < ratio <= 1:
        raise PointPeftError(f"ragged_farthest_point_sample: ratio must be above 0 and at most 1, got {ratio}")
    if block < 1:
        raise PointPeftError(f"ragged_farthest_point_sample: block must be at least 1, got {block}")
    with torch.no_grad():
        block_offset, bounds = runs_of(offset, block)
        size = bounds.diff()
        count = (size.double() * ratio).round().long().clamp_(min=1)
        end = count.cumsum(0)
        # The members of a block in the order of their numbers, as its first point and ties depend on it.
        owner = bounds.new_empty(len(points))
        owner[search.along_curve(points, offset)] = torch.repeat_interleave(size, output_size=len(points))
        member = owner.argsort(stable=True)
        index = member.new_empty(int(count.sum()))
        # Blocks of like size together: no row is padded to twice its length.
        for width in (2**power for power in range(int(size.amax() if len(size) else 0).bit_length() + 1)):
            group = ((size > width // 2) & (size <= width)).nonzero()[:, 0]
            if len(group) == 0:
                continue
            place = torch.arange(int(size[group].max()), device=points.device)
            # A row is filled up with its first point, which is never the farthest from itself.
            place = torch.where(place < size[group, None], place, 0)
            rows = member[bounds[group, None] + place]
            chosen = rows.gather(1, farthest_point_sample(points[rows], int(count[group].max())))
            step = torch.arange(chosen.shape[1], device=points.device)
            real = step < count[group, None]
            index[((end - count)[group, None] + step)[real]] = chosen[real]
        return index, nn.functional.pad(end, (1, 0))[block_offset]


def ragged_interpolate(features: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (m, c) of the rows `index` (m, k) of the features (s, c) under `weights` (m, k).

    Holds no copy of c channels per neighbour. Differentiable in features and weights.
    """
    if features.ndim != 2 or index.ndim != 2 or index.shape != weights.shape:
        raise PointPeftError(
            "ragged_interpolate: features must be (s, c), index and weights both (m, k), "
            f"got {tuple(features.shape)}, {tuple(index.shape)} and {tuple(weights.shape)}"
        )
    return nn.functional.embedding_bag(index, features, mode="sum", per_sample_weights=weights.to(features.dtype))


def nearest_weights(queries: Tensor, sources: Tensor, index: Tensor, eps: float = 1e-8) -> Tensor:
    """Weights (m, k) of the sources (s, 3) numbered `index` (m, k) at queries (m, 3): `1 / (d^2 + eps)`, of sum one.

    Where `ragged_knn` repeats the nearest source for those that are missing, it counts once. Differentiable in queries
    and sources.
    """
    queries, sources = packed_points(queries, "queries"), packed_points(sources, "sources")
    if index.ndim != 2 or len(index) != len(queries):
        raise PointPeftError(
            f"nearest_weights: index must be (m, k) for {len(queries)} queries, got {tuple(index.shape)}"
        )
    near = sources.index_select(0, index.flatten()).reshape(*index.shape, 3)
    # Both terms over eps, which cancels out: the exporter to ONNX takes an addend of 1e-8 for zero.
    weights = ((near - queries[:, None]).square().sum(dim=2) / eps + 1.0).reciprocal()
    weights = torch.cat([weights[:, :1], weights[:, 1:].masked_fill(index[:, 1:] == index[:, :1], 0.0)], dim=1)
    return weights / weights.sum(dim=1, keepdim=True)
