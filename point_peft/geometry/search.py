"""Search trees over packed points."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from point_peft.errors import PointPeftError
from point_peft.geometry.morton import cubes, interleaved
from point_peft.geometry.neighbours import CHUNK_ELEMENTS
from point_peft.geometry.offsets import counts_of, runs_of, samples_of

# Children of a node above the leaves of the search tree, queries that search together at most, and pairs of such a
# block and a leaf looked at in one go.
FAN = 16
QUERIES = 32
PAIRS = 2**18


@dataclass(frozen=True)
class Tree:
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


def build_tree(points: Tensor, offset: Tensor, size: int) -> Tree:
    leaf_offset, bounds = runs_of(offset, size)
    order = _spatial_order(points, leaf_offset, bounds)
    count = bounds.diff()
    place = torch.arange(size, device=points.device)
    index = order[bounds[:-1, None] + torch.minimum(place, count[:, None] - 1)]
    planes = points.T[:, index]
    low, high = planes.amin(2).T, planes.amax(2).T
    once = planes.masked_fill(place >= count[:, None], torch.inf)
    levels = [(low, high, bounds)]
    upper = leaf_offset
    while bool((counts_of(upper) > 1).any()):
        upper, bounds = runs_of(upper, FAN)
        child = bounds[:-1, None] + torch.minimum(torch.arange(FAN, device=points.device), bounds.diff()[:, None] - 1)
        low, high = low[child].amin(1), high[child].amax(1)
        levels.append((low, high, bounds))
    return Tree(
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
    counts = counts_of(leaf_offset)
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


def near_leaves(blocks: Tree, part: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
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


def needed_leaves(blocks: Tree, owner: Tensor, leaf: Tensor, tree: Tree, k: int) -> tuple[Tensor, Tensor]:
    """Those of the pairs of block and leaf in which some query of the block may have a neighbour."""
    none, together = len(tree.count), blocks.index.shape[1]
    # No query is near the box that stands for no leaf.
    low, high = (nn.functional.pad(corner.T, (0, 1), value=torch.inf) for corner in tree.levels[0][:2])
    owners, leaves = [], []
    for block, table in leaf_tables(owner, leaf, together, 3 * together * tree.index.shape[1], none):
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


def nearest_in_leaves(query: Tensor, table: Tensor, tree: Tree, k: int) -> Tensor:
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


def leaf_tables(owner: Tensor, leaf: Tensor, cost: int, row_cost: int, none: int) -> Iterator[tuple[Tensor, Tensor]]:
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


def along_curve(points: Tensor, offset: Tensor) -> Tensor:
    """The points (n,) of each sample in the order of a Z-order curve through the cube around the sample."""
    own = samples_of(offset, len(points))
    low, side = cubes(points, own, len(offset))
    cell = ((points - low[own]) / side.where(side > 0, 1)[own] * (2**21 - 1)).long()
    order = interleaved(cell.flip(1)).argsort(stable=True)
    return order[own[order].argsort(stable=True)]


def packed_points(points: Tensor, name: str) -> Tensor:
    """Points (n, 3), half precision widened. Raises if they are something else, or not finite."""
    if points.ndim != 2 or points.shape[1] != 3:
        raise PointPeftError(f"{name} must be (n, 3), got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise PointPeftError(f"{name} must be floating point, got {points.dtype}")
    if not bool(points.isfinite().all()):
        raise PointPeftError(f"{name} holds values that are not finite")
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
