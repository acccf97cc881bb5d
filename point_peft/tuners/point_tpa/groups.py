"""Groups of tokens that follow one another along a curve through their cloud."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Stage, spell_steps
from point_peft.errors import AnatomyError
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs, fetch_argument

Grouping = Literal["number", "length"]
"""A cloud is cut into a number of groups, or into groups of a length."""
SERIAL_ORDER = "serialized_order"
CURVE = "order_index"
"""Names in the code of Point Transformer V3 and of all that comes from it."""


@dataclass(frozen=True)
class Groups:
    """The group of each token."""

    of: Tensor
    """(n,) numbers of groups."""
    size: Tensor
    """(j,) the s that the sum of a group is divided by: tokens in a group, but for the last of a cloud with fewer."""

    def mean(self, tokens: Tensor) -> Tensor:
        """Sums of tokens (n, c) by group over s, (j, c)."""
        total = tokens.new_zeros(self.size.shape[0], tokens.shape[1]).index_add(0, self.of, tokens)
        return total / self.size[:, None]


@dataclass(frozen=True)
class Cut:
    """A way to cut clouds into groups."""

    by: Grouping
    value: int
    """Groups of a cloud, or tokens of a group."""

    def size(self, tokens: int) -> int:
        """The tokens s of a group in a cloud of `tokens`."""
        return -(-tokens // self.value) if self.by == "number" else self.value

    def dense(self, rank: Tensor, ahead: int) -> Groups:
        """Groups of clouds whose tokens have the places `rank` (b, g) on their curves, behind `ahead` that have none.

        Those are one group more. Tokens are counted cloud after cloud.
        """
        (b, g), s = rank.shape, self.size(rank.shape[1])
        runs = -(-g // s)
        of = nn.functional.pad(rank // s, (ahead, 0), value=runs)
        sizes = [s] * runs + [ahead] * (ahead > 0)
        of = of + len(sizes) * torch.arange(b, device=of.device)[:, None]
        return Groups(rearrange(of, "b l -> (b l)"), rank.new_tensor(sizes).repeat(b))

    def packed(self, order: Tensor, counts: Tensor) -> Groups:
        """Groups of packed tokens that `order` (n,) lists along their curves cloud by cloud, `counts` (b,) in each."""
        s = (counts + self.value - 1) // self.value if self.by == "number" else torch.full_like(counts, self.value)
        s = s.clamp(min=1)  # of a cloud without tokens, which has no group
        runs = (counts + s - 1) // s
        own = torch.repeat_interleave(counts, output_size=len(order))
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[own]
        along = (runs.cumsum(0) - runs)[own] + rank // s[own]
        return Groups(torch.empty_like(along).scatter(0, order.long(), along), torch.repeat_interleave(s, runs))


# ---- places on a curve -----------------------------------------------------------------------------------------------


def places_of(forward: Forward, stage: int) -> Tensor:
    """The place (b, g) of each dense token of a stage on the Z-order curve of its cloud; once per forward."""
    points = forward.seen.coordinates[stage]
    return forward.once(("point_tpa places", stage), lambda: geometry.morton_order(points).argsort(dim=1))


def cloud_sizes(forward: Forward, stage: int) -> Tensor:
    """The number (b,) of packed tokens of a stage in each cloud."""
    return geometry.counts_of(_by_cloud(forward, stage)[1])


def own_order(forward: Forward, stage: int) -> Tensor:
    """The packed tokens (n,) of a stage cloud by cloud along a Z-order curve through each; once per forward."""

    def sort() -> Tensor:
        order, ends = _by_cloud(forward, stage)
        return order[geometry.ragged_morton_order(forward.seen.coordinates[stage][order], ends)]

    return forward.once(("point_tpa order", stage), sort)


def _by_cloud(forward: Forward, stage: int) -> tuple[Tensor, Tensor]:
    """The packed tokens (n,) of a stage cloud by cloud, and where each cloud ends (b,); once per forward."""
    samples, n = forward.seen.samples[stage], len(forward.seen.coordinates[stage])
    return forward.once(("point_tpa clouds", stage), lambda: geometry.gathered(samples, n))


def serial_order(stage: Stage, attention: nn.Module, path: str, args: Args, kwargs: Kwargs) -> Tensor | None:
    """The order (n,) of packed tokens that a block is given for the curve of its attention; None if it is given none.

    It stands beside the tokens: in the mapping that holds them the rows (curves, n) of all curves, of which the
    attention has one, or an argument of its own with the one row. It changes with every stage, and where the model
    shuffles its curves with every forward. Raises `AnatomyError` if the attention does not say which row is its own.
    """
    steps = (*stage.tokens[:-1], SERIAL_ORDER)
    given = fetch_argument(args, kwargs, steps)
    if not isinstance(given, Tensor):
        return None
    if given.ndim == 1:
        return given
    row = vars(attention).get(CURVE)
    if row is None:
        raise AnatomyError(
            f"block '{path}' gets the order of its tokens along {len(given)} curves at its input{spell_steps(steps)}, "
            f"and its attention, a {type(attention).__name__}, does not say by an attribute {CURVE} which is its own"
        )
    return given[row]
