"""Functions on packed point clouds: the points of all samples one after another, with the end of each sample.

Scenes differ in size by orders of magnitude, so nothing here is padded to the largest sample: memory grows with the
number of points. `offset` (b,) holds where each sample ends: cumulative counts, the last is n; an empty sample repeats
the end before it. A sample's result depends on its own points alone, bit for bit, relative to where it starts.
Distances are taken from coordinate differences, and half precision is widened to float32, as in `geometry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from point_peft.errors import PointPeftError
from point_peft.geometry import CHUNK_ELEMENTS, farthest_point_sample

# Children of a node above the leaves of the search tree, queries that search together at most, and pairs of such a
# block and a leaf looked at in one go.
FAN = 16
QUERIES = 32
PAIRS = 2**18
# Shifts and masks that spread 21 bits over 63.
_SPREAD = (
    (32, 0x001F00000000FFFF),
    (16, 0x001F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)


@dataclass(frozen=True)
class _Tree:
    """The points of each sample cut into leaves of near points, and the boxes around runs of leaves.

    `levels` come from the leaves up, until no sample has more than one node: lower and upper corners (nodes, 3) of the
    boxes, and the children of each node: `bounds[i]` to `bounds[i + 1]` of the level below.
    """

    index: Tensor  # (leaves + 1, size) numbers of the points; a short leaf repeats its last, the last leaf means none
    inside: Tensor  # (3, leaves, size) the points of that number
    points: Tensor  # (3, leaves + 1, size) the points, each once and infinite where there is none
    count: Tensor  # (leaves,) points in each leaf
    sample: Tensor  # (leaves,)
    levels: list[tuple[Tensor, Tensor, Tensor]]
    root: Tensor  # (b,) the node of each sample in the last level; meaningless for an empty sample


def offset_of(samples: Tensor) -> Tensor:
    """The offset (b,) of points that carry sorted sample numbers (n,); a number that does not occur is an empty sample.

    Empty samples after the last number are not known of, so b is the last number plus one. Raises on numbers that are
    negative or not sorted.
    """
    _check_integers(samples, "samples")
    if len(samples) and bool((samples[1:] < samples[:-1]).any()):
        place = int((samples[1:] < samples[:-1]).nonzero()[0]) + 1
        raise PointPeftError(
            f"sample numbers must be sorted: number {int(samples[place])} follows {int(samples[place - 1])} "
            f"at point {place}"
        )
    if len(samples) and int(samples[0]) < 0:
        raise PointPeftError(f"sample numbers must not be negative, got {int(samples[0])}")
    return torch.bincount(samples).cumsum(0)


def samples_of(offset: Tensor, n: int) -> Tensor:
    """The sample number (n,) of each of the n points that `offset` (b,) divides. Raises if it does not divide n."""
    offset = _checked(offset, n, "offset")
    return torch.repeat_interleave(_counts(offset), output_size=n)


def as_offset(value: Tensor, n: int) -> Tensor:
    """The offset (b,) of n points from either form: an offset, or the sorted sample number of each point (n,).

    A value that ends in n is read as an offset: sample numbers that end in n would leave a sample without points.
    Raises if it is neither.
    """
    _check_integers(value, "offset or sample numbers")
    if len(value) and int(value[-1]) == n:
        return _checked(value, n, "offset")
    if len(value) == n:
        return offset_of(value)
    got = f"{len(value)} numbers, the last {int(value[-1])}" if len(value) else "no numbers"
    raise PointPeftError(f"expected an offset that ends in {n} or one sample number for each of {n} points, got {got}")


def gathered(samples: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The order (n,) of points in which each sample is in one piece, and the offset (b,) of the samples then.

    `samples` is an offset, or the sample number of each of the n points, which may be mingled.
    """
    order = torch.arange(n, device=samples.device)
    if len(samples) == n:
        samples, order = samples.sort(stable=True)
    return order, as_offset(samples, n)


def rows_of(offset: Tensor, n: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n points of all samples in rows of at most `size`, each of one sample: a batch for dense functions.

    Returns the numbers of the points (rows, size), where a shorter row repeats its last; which of them are not repeated
    (rows, size); and the sample (rows,). The rows of a sample are of nearly equal length.
    """
    row_offset, bounds = _runs(_checked(offset, n, "offset"), size)
    count = bounds.diff()
    place = torch.arange(int(count.amax() if len(count) else 0), device=offset.device)
    index = bounds[:-1, None] + torch.minimum(place, count[:, None] - 1)
    return index, place < count[:, None], samples_of(row_offset, len(count))


def ragged_knn(queries: Tensor, query_offset: Tensor, points: Tensor, offset: Tensor, k: int) -> Tensor:
    """Indices (m, k) of the `k` points (n, 3) nearest to each query (m, 3) in its own sample, nearest first.

    Exact; which of equally far points is taken depends on the sample alone. Where a sample has fewer than `k` points,
    its nearest point is repeated for those that are missing, so that no result depends on the size of other samples.
    No gradient. Raises if a sample has queries but no points, or a coordinate is not finite.

    Queries and points are cut into blocks of near ones. A block of queries goes down the boxes around the points and
    keeps those that can hold a neighbour, then looks at every point of the leaves it is left with.
    """
    queries, points = _wide(queries, "queries"), _wide(points, "points")
    query_offset = _checked(query_offset, len(queries), "query_offset")
    offset = _checked(offset, len(points), "offset")
    if len(query_offset) != len(offset):
        raise PointPeftError(f"queries and points differ in batch size: {len(query_offset)} and {len(offset)}")
    if k < 1:
        raise PointPeftError(f"ragged_knn: cannot choose {k} points")
    lacking = (_counts(query_offset) > 0) & (_counts(offset) == 0)
    if bool(lacking.any()):
        raise PointPeftError(f"ragged_knn: sample {int(lacking.nonzero()[0])} has queries but no points")
    if len(queries) == 0:
        return torch.empty(0, k, dtype=torch.int64, device=points.device)
    with torch.no_grad():
        # A leaf holds at least half its size, unless it is all of its sample: at least k points.
        size = 2 * max(8, 1 << (k - 1).bit_length())
        tree = _tree(points, offset, size)
        together = min(size, QUERIES)
        same = queries is points and together == size and torch.equal(query_offset, offset)
        blocks = tree if same else _tree(queries, query_offset, together)
        found = torch.empty(len(queries), k, dtype=torch.int64, device=points.device)
        step = max(1, PAIRS // int(torch.bincount(tree.sample).max()))
        for begin in range(0, len(blocks.count), step):
            part = torch.arange(begin, min(begin + step, len(blocks.count)), device=points.device)
            owner, leaf = _near_leaves(blocks, part, tree)
            owner, leaf = _needed_leaves(blocks, owner, leaf, tree, k)
            for block, table in _tables(owner, leaf, together * size, 0, len(tree.count)):
                nearest = _nearest(blocks.inside[:, block], table, tree, k)
                real = torch.arange(together, device=points.device) < blocks.count[block, None]
                found[blocks.index[block][real]] = nearest[real]
        own = _counts(offset)[samples_of(query_offset, len(queries))]
        missing = torch.arange(k, device=points.device) >= own[:, None]
        return torch.where(missing, found[:, :1], found)


def ragged_farthest_point_sample(
    points: Tensor, offset: Tensor, ratio: float, block: int = 1024
) -> tuple[Tensor, Tensor]:
    """Indices (s,) of a share `ratio` of the points (n, 3) of each sample, spread far apart, and their offset (b,).

    Of n_i points `max(1, round(ratio * n_i))` are chosen, those of `geometry.farthest_point_sample` and in its order,
    as long as a sample has at most `block` points. The cost of that grows with n_i squared, so a larger sample is cut
    along a Z-order curve into blocks of nearly equal size, and each block is sampled like a cloud of its own. No
    gradient. Raises on a ratio outside 0 .. 1.
    """
    points = _wide(points, "points")
    offset = _checked(offset, len(points), "offset")
    if not 0 < ratio <= 1:
        raise PointPeftError(f"ragged_farthest_point_sample: ratio must be above 0 and at most 1, got {ratio}")
    if block < 1:
        raise PointPeftError(f"ragged_farthest_point_sample: block must be at least 1, got {block}")
    with torch.no_grad():
        block_offset, bounds = _runs(offset, block)
        size = bounds.diff()
        count = (size.double() * ratio).round().long().clamp_(min=1)
        end = count.cumsum(0)
        # The members of a block in the order of their numbers, as its first point and ties depend on it.
        owner = bounds.new_empty(len(points))
        owner[_z_order(points, offset)] = torch.repeat_interleave(size, output_size=len(points))
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
    queries, sources = _wide(queries, "queries"), _wide(sources, "sources")
    if index.ndim != 2 or len(index) != len(queries):
        raise PointPeftError(
            f"nearest_weights: index must be (m, k) for {len(queries)} queries, got {tuple(index.shape)}"
        )
    near = sources.index_select(0, index.flatten()).reshape(*index.shape, 3)
    # Both terms over eps, which cancels out: the exporter to ONNX takes an addend of 1e-8 for zero.
    weights = ((near - queries[:, None]).square().sum(dim=2) / eps + 1.0).reciprocal()
    weights = torch.cat([weights[:, :1], weights[:, 1:].masked_fill(index[:, 1:] == index[:, :1], 0.0)], dim=1)
    return weights / weights.sum(dim=1, keepdim=True)


def _tree(points: Tensor, offset: Tensor, size: int) -> _Tree:
    leaf_offset, bounds = _runs(offset, size)
    order = _spatial_order(points, leaf_offset, bounds)
    count = bounds.diff()
    place = torch.arange(size, device=points.device)
    index = order[bounds[:-1, None] + torch.minimum(place, count[:, None] - 1)]
    planes = points.T[:, index]
    low, high = planes.amin(2).T, planes.amax(2).T
    once = planes.masked_fill(place >= count[:, None], torch.inf)
    levels = [(low, high, bounds)]
    upper = leaf_offset
    while bool((_counts(upper) > 1).any()):
        upper, bounds = _runs(upper, FAN)
        child = bounds[:-1, None] + torch.minimum(torch.arange(FAN, device=points.device), bounds.diff()[:, None] - 1)
        low, high = low[child].amin(1), high[child].amax(1)
        levels.append((low, high, bounds))
    return _Tree(
        index=nn.functional.pad(index, (0, 0, 0, 1)),
        inside=planes,
        points=nn.functional.pad(once, (0, 0, 0, 1), value=torch.inf),
        count=count,
        sample=samples_of(leaf_offset, len(count)),
        levels=levels,
        root=upper - 1,
    )


def _spatial_order(points: Tensor, leaf_offset: Tensor, bounds: Tensor) -> Tensor:
    """The points (n,) of each sample in the order of its leaves: halved again and again across the widest axis."""
    n = len(points)
    order = torch.arange(n, device=points.device)
    rank = torch.stack([plane.argsort(stable=True).argsort() for plane in points.unbind(1)], dim=1)
    counts = _counts(leaf_offset)
    first = nn.functional.pad(leaf_offset[counts > 0], (1, 0))
    for _ in range((int(counts.max()) - 1).bit_length() if len(counts) else 0):
        node = torch.repeat_interleave(bounds[first].diff(), output_size=n)
        own = node[:, None].expand(n, 3)
        edge = points.new_empty(len(first) - 1, 3)
        moved = points[order]
        width = edge.scatter_reduce(0, own, moved, "amax", include_self=False)
        width = width - edge.scatter_reduce(0, own, moved, "amin", include_self=False)
        along = rank[order].gather(1, width.argmax(1)[node][:, None])[:, 0]
        order = order[(node * n + along).argsort()]
        first = torch.unique(torch.cat([first, (first[:-1] + first[1:]) // 2]))
    # In a leaf by number: how often a leaf was sorted must not show.
    leaf = torch.empty_like(order)
    leaf[order] = torch.repeat_interleave(bounds.diff(), output_size=n)
    return leaf.argsort(stable=True)


def _near_leaves(blocks: _Tree, part: Tensor, tree: _Tree) -> tuple[Tensor, Tensor]:
    """Pairs of a block of queries and a leaf that may hold one of their neighbours, from the boxes alone."""
    low, high, _ = blocks.levels[0]
    owner, node = part, tree.root[blocks.sample[part]]
    for level in range(len(tree.levels) - 1, 0, -1):
        bounds = tree.levels[level][2]
        begin, number = bounds[node], bounds[node + 1] - bounds[node]
        pair = torch.repeat_interleave(number)
        node = torch.arange(len(pair), device=pair.device) - (number.cumsum(0) - number - begin)[pair]
        owner = owner[pair]
        lower, upper, _ = tree.levels[level - 1]
        from_low, to_high = lower[node] - high[owner], upper[node] - low[owner]
        near = _squared_length(torch.maximum(from_low, -to_high).clamp_(min=0))
        far = _squared_length(torch.maximum(-from_low, to_high))
        # Every node here holds k points, so the k nearest of the block's queries are no farther than in one of them.
        # That one is kept and of the others what is nearer: of a thousand points at one place k are enough.
        row, place = owner - part[0], torch.arange(len(owner), device=owner.device)
        reach = far.new_empty(len(part)).scatter_reduce(0, row, far, "amin", include_self=False)[row]
        place = place.masked_fill(far > reach, len(owner))
        keep = near < reach
        keep[part.new_empty(len(part)).scatter_reduce(0, row, place, "amin", include_self=False)] = True
        owner, node = owner[keep], node[keep]
    return owner, node


def _needed_leaves(blocks: _Tree, owner: Tensor, leaf: Tensor, tree: _Tree, k: int) -> tuple[Tensor, Tensor]:
    """Those of the pairs of block and leaf in which some query of the block may have a neighbour."""
    none, together = len(tree.count), blocks.index.shape[1]
    # No query is near the box that stands for no leaf.
    low, high = (nn.functional.pad(corner.T, (0, 1), value=torch.inf) for corner in tree.levels[0][:2])
    owners, leaves = [], []
    for block, table in _tables(owner, leaf, together, 3 * together * tree.index.shape[1], none):
        query = blocks.inside[:, block]
        lower, upper = low[:, table][:, :, None], high[:, table][:, :, None]
        near = _gap(lower, upper, query[..., None])
        closest = near.argmin(2)
        # The nearest leaf holds k points: the k-th of them bounds the k-th distance of the query.
        seed = table.gather(1, closest)
        reach = _squared(query[..., None], tree.points[:, seed]).kthvalue(k, dim=2).values
        needed = (near < reach[:, :, None]).any(1).scatter_(1, closest, True)
        row, column = needed.nonzero().unbind(1)
        owners.append(block[row])
        leaves.append(table[row, column])
    owner, leaf = torch.cat(owners), torch.cat(leaves)
    order = owner.argsort(stable=True)
    return owner[order], leaf[order]


def _nearest(query: Tensor, table: Tensor, tree: _Tree, k: int) -> Tensor:
    """The `k` nearest (r, size, k) to queries (3, r, size) among the points of the leaves in each row of `table`."""
    distance = _squared(query[..., None], tree.points[:, table].flatten(2)[:, :, None])
    if distance.dtype == torch.float32:
        # A distance and its place in one number, so that places decide between equal distances.
        key = distance.view(torch.int32).long().bitwise_left_shift_(32)
        key += torch.arange(key.shape[2], device=key.device)
        place = key.topk(k, largest=False).values.bitwise_and_(2**32 - 1)
    else:
        place = distance.sort(stable=True).indices[..., :k]
    return tree.index[table].flatten(1).gather(1, place.flatten(1)).view_as(place)


def _tables(owner: Tensor, leaf: Tensor, cost: int, row_cost: int, none: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of block and leaf, sorted by block, as blocks (r,) and tables (r, width) of their leaves.

    Blocks with similar numbers of leaves come together, `none` fills the rows that are shorter; `cost` and
    `row_cost` are what an entry and a row take of the elements that a chunk may hold.
    """
    blocks, number = torch.unique_consecutive(owner, return_counts=True)
    begin = number.cumsum(0) - number
    order = number.argsort(descending=True, stable=True)
    done = 0
    while done < len(order):
        width = int(number[order[done]])
        row = order[done : done + max(1, CHUNK_ELEMENTS // (width * cost + row_cost))]
        place = torch.arange(width, device=leaf.device)
        table = leaf[(begin[row, None] + place).clamp_(max=len(leaf) - 1)]
        yield blocks[row], table.masked_fill_(place >= number[row, None], none)
        done += len(row)


def _squared_length(step: Tensor) -> Tensor:
    """Of steps (pairs, 3), rounded as in `_squared`."""
    x, y, z = step.square_().unbind(1)
    return x + y + z


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances between planes (3, ...) that broadcast. Plain operations: each is rounded the same anywhere."""
    total = (a[0] - b[0]).square_()
    step = torch.empty_like(total)
    for axis in (1, 2):
        total += torch.sub(a[axis], b[axis], out=step).mul_(step)
    return total


def _gap(low: Tensor, high: Tensor, query: Tensor) -> Tensor:
    """Squared distances between queries and boxes, planes (3, ...) that broadcast.

    Rounded as in `_squared`, so that it is never more than the distance to any point of the box.
    """
    total = torch.maximum(low[0] - query[0], query[0] - high[0]).clamp_(min=0).square_()
    for axis in (1, 2):
        total += torch.maximum(low[axis] - query[axis], query[axis] - high[axis]).clamp_(min=0).square_()
    return total


def _z_order(points: Tensor, offset: Tensor) -> Tensor:
    """The points (n,) of each sample in the order of a Z-order curve through the cube around the sample."""
    n = len(points)
    own = samples_of(offset, n)
    corner = points.new_zeros(len(offset), 3)
    low = corner.scatter_reduce(0, own[:, None].expand(n, 3), points, "amin", include_self=False)
    high = corner.scatter_reduce(0, own[:, None].expand(n, 3), points, "amax", include_self=False)
    side = (high - low).amax(1, keepdim=True)
    cell = ((points - low[own]) / side.where(side > 0, 1)[own] * (2**21 - 1)).long()
    # Two zero bits between any two bits of a coordinate.
    for shift, mask in _SPREAD:
        cell = (cell | cell << shift) & mask
    order = (cell[:, 0] | cell[:, 1] << 1 | cell[:, 2] << 2).argsort(stable=True)
    return order[own[order].argsort(stable=True)]


def _runs(offset: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each sample cut into as few runs of at most `size` as can be, of nearly equal length.

    Returns the offset (b,) of the samples in runs, and the bounds (runs + 1,) of the runs.
    """
    counts = _counts(offset)
    runs = (counts + size - 1) // size
    run_offset = runs.cumsum(0)
    own = torch.repeat_interleave(runs)
    number = torch.arange(len(own), device=offset.device) - (run_offset - runs)[own]
    begin = (offset - counts)[own] + number * counts[own] // runs[own]
    return run_offset, torch.cat([begin, offset[-1:] if len(offset) else offset.new_zeros(1)])


def _counts(offset: Tensor) -> Tensor:
    return nn.functional.pad(offset, (1, 0)).diff()


def _wide(points: Tensor, name: str) -> Tensor:
    """Points (n, 3), half precision widened. Raises if they are something else, or not finite."""
    if points.ndim != 2 or points.shape[1] != 3:
        raise PointPeftError(f"{name} must be (n, 3), got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise PointPeftError(f"{name} must be floating point, got {points.dtype}")
    if not bool(points.isfinite().all()):
        raise PointPeftError(f"{name} holds values that are not finite")
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def _checked(offset: Tensor, n: int, name: str) -> Tensor:
    """The offset as int64. Raises if it does not divide n points."""
    _check_integers(offset, name)
    offset = offset.long()
    last = int(offset[-1]) if len(offset) else 0
    if last != n:
        raise PointPeftError(f"{name} must end in {n}, the number of points, got {last}")
    if bool((_counts(offset) < 0).any()):
        place = int((_counts(offset) < 0).nonzero()[0])
        raise PointPeftError(f"{name} must not decrease, but sample {place} ends at {int(offset[place])}")
    return offset


def _check_integers(value: Tensor, name: str) -> None:
    if value.ndim != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise PointPeftError(f"{name} must be integers of one dimension, got {value.dtype} {tuple(value.shape)}")
